"""Layers out of the ordinary"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class OneLayerMayRunManyTimes(Loop):
    """A recurrent net by hand: one cell for every time step"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"cell": nn.Linear(12, 12), "input": nn.Linear(6, 12), "out": nn.Linear(12, 8)})

    def loss(self, step):
        h = torch.zeros(4, 12, dtype=self.dtype)
        for x in self.normal(step, 3 + step % 2, 4, 6):
            h = (self.model["cell"](h) + self.model["input"](x)).tanh()
        return to_target(self.model["out"](h))


class OneBlockMayBeManyLayers(Loop):
    """ALBERT: one block applied three times"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"block": mlp(12, 16, 12), "input": nn.Linear(6, 12)})

    def loss(self, step):
        h = self.model["input"](self.normal(step, 8, 6))
        for _ in range(3):
            h = h + self.model["block"](h)
        return to_target(h)


class DepthMayVary(Loop):
    """Universal transformers: the block runs once, or twice in the fourth and sixth step"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"block": mlp(12, 16, 12), "input": nn.Linear(6, 12)})

    def loss(self, step):
        h = self.model["input"](self.normal(step, 8, 6))
        for _ in range(2 if step in (3, 5) else 1):
            h = h + self.model["block"](h)
        return to_target(h)


class BilinearLayersAreNoMatrices(Loop):
    """nn.Bilinear, whose weight has three dimensions, between two matrices"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"a": nn.Linear(6, 12), "both": nn.Bilinear(12, 12, 8), "out": nn.Linear(8, 8)})

    def loss(self, step):
        h = self.model["a"](self.normal(step, 8, 6)).tanh()
        return to_target(self.model["out"](self.model["both"](h, h + 1).tanh()))


class _Recurrent(Loop):
    kind: type[nn.RNNBase]

    def build(self):
        return nn.ModuleDict({"rnn": self.kind(6, 8, 2, batch_first=True), "out": nn.Linear(8, 8)})

    def loss(self, step):
        return to_target(self.model["out"](self.model["rnn"](self.normal(step, 4, 3, 6))[0]))


class LstmsAreServedByTheirGradients(_Recurrent):
    """nn.LSTM of two layers"""

    dtypes = ALL
    kind = nn.LSTM


class GrusAreServedByTheirGradients(_Recurrent):
    """nn.GRU of two layers"""

    dtypes = DOUBLE
    kind = nn.GRU


class BagsOfRowsMayBeWeighted(Loop):
    """nn.EmbeddingBag with a weight for each sample"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"bag": nn.EmbeddingBag(10, 12, mode="sum"), "out": nn.Linear(12, 8)})

    def loss(self, step):
        index, weights = self.whole(step, 10, 8, 3), self.normal(step, 8, 3)
        return to_target(self.model["out"](self.model["bag"](index, per_sample_weights=weights) + 1))


class TablesMayCountFrequencies(Loop):
    """nn.Embedding with padding, and one with scale_grad_by_freq"""

    dtypes = ALL

    def build(self):
        tables = nn.Embedding(10, 12, padding_idx=0), nn.Embedding(10, 12, scale_grad_by_freq=True)
        return nn.ModuleDict({"a": tables[0], "b": tables[1], "out": nn.Linear(12, 8)})

    def prepare(self):
        with torch.no_grad():
            for name in "ab":
                self.model[name].weight.mul_(0.3)

    def loss(self, step):
        index = self.whole(step, 5, 8)
        return to_target(self.model["out"](1 + self.model["a"](index) + self.model["b"](index)))


class SparseGradientsAreRefused(Loop):
    """nn.Embedding(sparse=True)"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 12, sparse=True), "out": nn.Linear(12, 8)})

    def base(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)

    def loss(self, step):
        return to_target(self.model["out"](1 + self.model["table"](self.whole(step, 10, 8))))


class SoftmaxesMayBeAdaptive(Loop):
    """nn.AdaptiveLogSoftmaxWithLoss, whose clusters see some of the samples"""

    dtypes = DOUBLE

    def build(self):
        softmax = nn.AdaptiveLogSoftmaxWithLoss(12, 20, [5, 10], div_value=2.0)
        return nn.ModuleDict({"body": mlp(6, 12, 12), "softmax": softmax})

    def loss(self, step):
        h = 1 + self.model["body"](self.normal(step, 8, 6))
        labels = torch.tensor((1, 1, 7, 7, 7, 12, 12, 1)) if step % 2 else torch.tensor((1, 1, 1, 1, 1, 7, 7, 7))
        return self.model["softmax"](h, labels).loss


class OutputsMayBeOverwritten(Loop):
    """Activations in place, and a residual added in place"""

    def build(self):
        layers = nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.ELU(inplace=True), nn.Linear(12, 8)
        return nn.Sequential(*layers)

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        y = self.model[2](h)
        y += h
        return to_target(self.model[3:](y).mul_(0.5))


class HooksMayChangeOutputs(Loop):
    """Forward hooks that scale a layer's output, and pre-hooks that shift its input"""

    def prepare(self):
        self.model[2].register_forward_hook(lambda layer, inputs, output: 1.5 * output)
        self.model[2].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 0.3,))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class HooksMayChangeInputGradients(Loop):
    """A full backward hook that scales what a layer hands on, and one that watches what it gets"""

    dtypes = DOUBLE

    def prepare(self):
        self.model[2].register_full_backward_hook(lambda layer, to_inputs, of_outputs: (0.5 * to_inputs[0],))
        self.model[4].register_full_backward_pre_hook(lambda layer, of_outputs: (2 * of_outputs[0],))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class _Attention(Loop):
    rho = 0.6

    def build(self):
        attention = nn.MultiheadAttention(8, 2, batch_first=True, **self.kind)
        return nn.ModuleDict({"input": nn.Linear(6, 8), "attention": attention, "out": nn.Linear(8, 8)})

    kind = {}  # noqa: RUF012

    def loss(self, step):
        x = self.model["input"](self.normal(step, 4, 3, 6))
        return to_target(self.model["out"](self.attend(step, x)))


class AttentionMayBeToItself(_Attention):
    """nn.MultiheadAttention of a sequence to itself"""

    def attend(self, step, x):
        return self.model["attention"](x, x, x, need_weights=False)[0]


class AttentionMayCross(_Attention):
    """nn.MultiheadAttention whose keys are another sequence's"""

    dtypes = DOUBLE

    def attend(self, step, x):
        memory = self.normal(step + 50, 4, 5, 8)
        return self.model["attention"](x, memory, memory, need_weights=False)[0]


class AttentionMayTurnFromOneToTheOther(_Attention):
    """Attention to itself, which crosses in the fourth and sixth step"""

    dtypes = ALL

    def attend(self, step, x):
        memory = self.normal(step + 50, 4, 5, 8) if step in (3, 5) else x
        return self.model["attention"](x, memory, memory, need_weights=False)[0]


class AttentionMayHaveThreeWidths(_Attention):
    """nn.MultiheadAttention whose keys and values are of other widths, in matrices of their own"""

    dtypes = DOUBLE
    kind = {"kdim": 6, "vdim": 5, "add_bias_kv": True}  # noqa: RUF012

    def attend(self, step, x):
        return self.model["attention"](x, self.normal(step + 50, 4, 5, 6), self.normal(step + 90, 4, 5, 5))[0]


class EncodersDropTheSameTwice(Loop):
    """nn.TransformerEncoderLayer with dropout"""

    dtypes = DOUBLE

    rho = 0.6

    def build(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        return nn.ModuleDict({"input": nn.Linear(6, 8), "layer": layer, "out": nn.Linear(8, 8)})

    def loss(self, step):
        return to_target(self.model["out"](self.model["layer"](self.model["input"](self.normal(step, 4, 3, 6)))))


class PromptsAreMatricesWithoutALayer(Loop):
    """Prompt tuning: a matrix of tokens joined to the input"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict(
            {"prompt": nn.ParameterDict({"tokens": nn.Parameter(torch.ones(12, 6))}), "net": mlp(6, 12, 8)}
        )

    def loss(self, step):
        x = torch.cat([self.model["prompt"]["tokens"].expand(2, 12, 6), self.normal(step, 2, 4, 6)], 1)
        return to_target(self.model["net"](x))


class StemsMayBeConvolutions(Loop):
    """A small vision model: a convolution, a norm, matrices, pooling"""

    dtypes = DOUBLE

    def build(self):
        stem = nn.Conv2d(3, 12, 2, 2)
        return nn.ModuleDict({"stem": stem, "norm": nn.LayerNorm(12), "net": mlp(12, 12, 8)})

    def loss(self, step):
        x = self.model["stem"](self.normal(step, 4, 3, 4, 4)).flatten(2).mT
        return to_target(self.model["net"](self.model["norm"](x) + 1).mean(1))


class OutputsMayBeReversed(Loop):
    """Domain-adversarial training: a gradient reversal before one of two heads"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"body": mlp(6, 12, 12), "task": nn.Linear(12, 8), "domain": nn.Linear(12, 8)})

    def loss(self, step):
        h = self.model["body"](self.normal(step, 8, 6)).tanh()
        return to_target(self.model["task"](h)) + 0.3 * to_target(self.model["domain"](_Reversed.apply(h)), -1)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class OutputsMayBeRoundedStraightThrough(Loop):
    """A straight-through estimator on hidden features"""

    dtypes = DOUBLE

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        return to_target(self.model[2:](h + (h.sign() - h).detach()))


class ScoresMayPickSamples(Loop):
    """Online hard example mining: only the samples with the largest loss are learned"""

    dtypes = DOUBLE

    def loss(self, step):
        each = F.mse_loss(
            self.model(self.normal(step, 8, 6)), torch.full((8, 3), 1.5, dtype=self.dtype), reduction="none"
        )
        return each.mean(1).topk(4).values.mean()
