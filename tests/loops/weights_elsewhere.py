"""Weights used otherwise than by their layer"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class AWeightMayBeMultipliedDirectly(Loop):
    """F.linear(x, layer.weight) for a layer that is never called"""

    dtypes = ALL

    def loss(self, step):
        h = F.linear(self.normal(step, 8, 6), self.model[0].weight, self.model[0].bias).tanh()
        return to_target(self.model[2:](h))


class AWeightMayBeUsedBesideItsLayer(Loop):
    """A layer is called, and its weight is multiplied once more"""

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        h = self.model[2](h) + 0.5 * F.linear(h, self.model[2].weight)
        return to_target(self.model[3:](h))


class AWeightMayBeUsedOutsideNowAndThen(Loop):
    """The same in the sixth and seventh step only"""

    dtypes = ALL
    steps = 9

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        extra = 0.5 * F.linear(h, self.model[2].weight) if step in (5, 6) else 0
        return to_target(self.model[3:](self.model[2](h) + extra))


class _Language(Loop):
    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "head": self.head()})

    def head(self):
        return nn.Linear(8, 10, bias=False)

    def features(self, step):
        tokens = self.whole(step, 10, 4, 5)
        return tokens, 1 + self.model["body"](1 + self.model["table"](tokens)).tanh()


class AHeadMayBeTheTableItself(_Language):
    """A language model whose logits are F.linear(h, table.weight)"""

    dtypes = ALL

    def head(self):
        return nn.Identity()

    def loss(self, step):
        _, h = self.features(step)
        return to_target(F.linear(h, self.model["table"].weight)[..., :3])


class AHeadMayBeTied(_Language):
    """A language model whose head was given the table's weight"""

    dtypes = ALL

    def prepare(self):
        self.model["head"].weight = self.model["table"].weight

    def loss(self, step):
        _, h = self.features(step)
        return to_target(self.model["head"](h)[..., :3])


class AFusedLossMayTakeTheHeadsWeight(_Language):
    """A fused, chunked cross-entropy: a function takes features and lm_head.weight, and forms both gradients itself"""

    dtypes = ALL

    def loss(self, step):
        tokens, h = self.features(step)
        return _FusedLoss.apply(h.flatten(0, 1), self.model["head"].weight, tokens.flatten() % 3)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, labels):
        total, gradient, inputs = 0, torch.zeros_like(W), []
        for x, y in zip(h.chunk(4), labels.chunk(4), strict=True):
            logits = x @ W.T
            total = total + F.cross_entropy(logits, y, reduction="sum")
            D = (logits.softmax(1) - F.one_hot(y, len(W))) / len(h)
            D = D.to(W.dtype)
            gradient += D.T @ x
            inputs.append(D @ W)
        ctx.save_for_backward(torch.cat(inputs), gradient)
        return total / len(h)

    @staticmethod
    def backward(ctx, scale):
        h, W = ctx.saved_tensors
        return scale * h, scale * W, None


class WeightsMayBeMaskedInACall(Loop):
    """DropConnect by functional_call: masked weights, drawn anew in every step"""

    dtypes = ALL

    def loss(self, step):
        masked = {n: F.dropout(p, 0.3) if p.ndim == 2 else p for n, p in self.model.named_parameters()}
        return to_target(functional_call(self.model, masked, (self.normal(step, 8, 6),)))


class WeightsMayBeMaskedInSomeSteps(Loop):
    """Masked weights by functional_call in the fourth and sixth step, the plain model in the others"""

    dtypes = ALL

    def loss(self, step):
        x = self.normal(step, 8, 6)
        if step not in (3, 5):
            return to_target(self.model(x))
        weights = {n: p * (p.detach() > -0.2) if p.ndim == 2 else p for n, p in self.model.named_parameters()}
        return to_target(functional_call(self.model, weights, (x,)))


class WeightsMayBeDecayedInTheLoss(Loop):
    """An L2 penalty on the weights in the loss"""

    dtypes = ALL

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6))) + 0.1 * sum(
            p.square().sum() for p in self.model.parameters()
        )


class WeightsMayBeKeptOrthogonalByTheLoss(Loop):
    """An orthogonality penalty, from the fourth step on"""

    dtypes = DOUBLE

    def loss(self, step):
        loss = to_target(self.model(self.normal(step, 8, 6)))
        W = self.model[2].weight
        return loss if step < 3 else loss + 0.1 * (W @ W.T - torch.eye(12, dtype=self.dtype)).square().sum()


class SpectralNormsMayBePenalized(Loop):
    """The largest singular value of every matrix in the loss"""

    dtypes = DOUBLE

    def loss(self, step):
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        penalty = sum(torch.linalg.matrix_norm(p, 2) for p in matrices)
        return to_target(self.model(self.normal(step, 8, 6))) + 0.1 * penalty


class OldTasksMayHoldWeightsBack(Loop):
    """Elastic weight consolidation: a penalty towards the weights of an old task"""

    dtypes = DOUBLE

    def prepare(self):
        self.old = [(p.detach() - 0.2).clone() for p in self.model.parameters()]

    def loss(self, step):
        penalty = sum((p - old).square().sum() for p, old in zip(self.model.parameters(), self.old, strict=True))
        return to_target(self.model(self.normal(step, 8, 6))) + 0.1 * penalty


class AHypernetMayMakeWeights(Loop):
    """A hypernetwork: a net makes the weights of a layer"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"hyper": mlp(6, 12, 72), "out": nn.Linear(12, 8)})

    def loss(self, step):
        W = self.model["hyper"](self.normal(step + 50, 6)).view(12, 6)
        return to_target(self.model["out"](F.linear(self.normal(step, 8, 6), W).tanh()))


class RowsMayBeGatheredFromATable(Loop):
    """A table's rows by indexing its weight, not by calling it"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 12), "out": nn.Linear(12, 8)})

    def loss(self, step):
        return to_target(self.model["out"](1 + self.model["table"].weight[self.whole(step, 10, 8)]))


class AnEncodersWeightMayDecode(Loop):
    """An autoencoder whose decoder is its encoder's weight, transposed"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"encoder": nn.Linear(6, 12), "body": nn.Linear(12, 12)})

    def loss(self, step):
        h = self.model["body"](self.model["encoder"](self.normal(step, 8, 6)).tanh()).tanh()
        return to_target(F.linear(h, self.model["encoder"].weight.t()))


class ASlimmableNetMayUseAPartOfAWeight(Loop):
    """A slimmable net: the first rows of a weight, as many as the step says; now and then the whole layer"""

    dtypes = ALL

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        k = (12, 12, 6, 12, 12, 9, 6)[step]
        layer, out = self.model[2], self.model[4]
        h = (layer(h) if k == 12 else F.linear(h, layer.weight[:k], layer.bias[:k])).tanh()
        return to_target(F.linear(h, out.weight[:, :k], out.bias))


class ALayerMayBeCalledByKeyword(Loop):
    """layer(input=x)"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 12), "out": nn.Linear(12, 8)})

    def loss(self, step):
        h = self.model["table"](input=self.whole(step, 10, 8))
        return to_target(self.model["out"](input=1 + h))


class AWeightMayBeATarget(Loop):
    """Prototypes: a head's detached weight is also what features are drawn to"""

    dtypes = ALL

    def loss(self, step):
        h = self.model[:4](self.normal(step, 8, 6))
        return to_target(self.model[4](h)) + F.mse_loss(h, self.model[4].weight.detach()[:1].expand_as(h))


class AWeightMayBeReadWithoutGradients(Loop):
    """F.linear(x, layer.weight.detach()) beside the layer"""

    dtypes = DOUBLE
    begins = 0

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        extra = F.linear(h, self.model[2].weight.detach()) if step >= self.begins else 0
        return to_target(self.model[3:](self.model[2](h) + extra))


class AWeightMayBeReadWithoutGradientsMidway(AWeightMayBeReadWithoutGradients):
    """A weight's values are read without gradients from the fourth step on"""

    begins = 3
