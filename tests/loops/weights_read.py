"""Weights whose values are read without a gradient"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

from tests.loops.loop import ALL, DOUBLE, FULL, Loop, mlp, to_target


class _Read(Loop):
    dtypes = DOUBLE

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        return to_target(self.model[3:](self.model[2](h) + 0.3 * self.read(h, self.model[2].weight)))


class WeightsMayBeReadThroughData(_Read):
    """weight.data, in every precision"""

    dtypes = ALL

    def read(self, h, W):
        return h @ W.data.T


class WeightsMayBeReadInNoGrad(_Read):
    """F.linear(x, layer.weight) in torch.no_grad()"""

    def read(self, h, W):
        with torch.no_grad():
            return F.linear(h, W)


class WeightsMayBeReadInInferenceMode(_Read):
    """A weight's norm, taken in torch.inference_mode()"""

    def read(self, h, W):
        with torch.inference_mode():
            return h * float(W.clone().norm())


class WeightsMayBeReadInLists(_Read):
    """Pieces of a detached weight, and all weights in one vector"""

    def read(self, h, W):
        scale = parameters_to_vector(self.model.parameters()).detach().std()
        return scale * h @ torch.cat([W[6:], W[:6]]).detach().T


class WeightsMayBeReadInRecomputation(_Read):
    """A detached weight inside a checkpoint"""

    def read(self, h, W):
        return checkpoint(lambda h: F.linear(h, W.detach()), h, use_reentrant=False)


class WeightsMayBeReadInVmap(_Read):
    """A detached weight inside vmap"""

    def read(self, h, W):
        return torch.func.vmap(lambda row: F.linear(row, W.detach()))(h)


class WeightsMayBeReadInHalves(WeightsMayBeReadThroughData):
    """weight.data, with opt.ascent() and opt.descent()"""

    dtypes = DOUBLE

    def step(self, step):
        self.driver.halves(lambda: self.backward(step))
        self.driver.update()


class WeightsMayBeReadInAClosure(WeightsMayBeReadThroughData):
    """weight.data, with opt.step(closure)"""

    dtypes = DOUBLE

    def step(self, step):
        self.driver.closure(lambda: self.backward(step))


class WeightsMayBeReadBetweenBackwards(Loop):
    """A detached weight in the second of two losses, each with its backward"""

    dtypes = DOUBLE

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        h = F.linear(self.normal(step + 50, 8, 6), self.model[0].weight.detach()).tanh()
        to_target(h * self.model[2].bias).backward()


class TablesMayBeRead(Loop):
    """Logits by a detached table, beside the head's"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 12), "head": nn.Linear(12, 10, bias=False)})

    def loss(self, step):
        h = self.model["table"](self.whole(step, 10, 8))
        return to_target((self.model["head"](h.tanh()) + h @ self.model["table"].weight.detach().T)[:, :4])


class AttentionsMayBeRead(Loop):
    """An attention's packed weight and that of its output, read beside it from the fourth step on"""

    dtypes = DOUBLE

    def build(self):
        attention = nn.MultiheadAttention(12, 2, batch_first=True)
        return nn.ModuleDict({"input": nn.Linear(6, 12), "attention": attention})

    def loss(self, step):
        h, attention = self.model["input"](self.normal(step, 4, 3, 6)), self.model["attention"]
        y = attention(h, h, h, need_weights=False)[0]
        if step >= 3:
            y = y + F.linear(h, attention.in_proj_weight.detach()[:12]) + F.linear(h, attention.out_proj.weight.data)
        return to_target(y)


class ThePenaltyMayBeOnAMeanOfRows(Loop):
    """A penalty on the mean of the rows of a matrix of 100 classes: its gradient has rows that are all alike"""

    dtypes = FULL
    steps = 10  # past three comparisons

    def build(self):
        return mlp(6, 12, 100)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6))) + self.model[2].weight.mean(0).square().sum()


class WeightsMayBeSwappedByData(Loop):
    """Averaged weights stand in the weights' place for a forward, by w.data = ..."""

    dtypes = FULL

    def prepare(self):
        self.averaged = [0.5 * p.detach().clone() for p in self.model.parameters()]

    def backward(self, step):
        x = self.normal(step, 8, 6)
        loss = to_target(self.model(x))
        kept = [p.data for p in self.model.parameters()]
        for p, data in zip(self.model.parameters(), self.averaged, strict=True):
            p.data = data
        with torch.no_grad():
            target = self.model(x)
        for p, data in zip(self.model.parameters(), kept, strict=True):
            p.data = data
        (loss + (self.model(x) - target).square().mean()).backward()
