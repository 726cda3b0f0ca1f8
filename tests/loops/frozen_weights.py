"""Frozen weights that are perturbed"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _Frozen(Loop):
    frozen = True
    dtypes = DOUBLE

    def build(self):
        parts = {"input": nn.Linear(6, 12), "cell": nn.Linear(12, 12), "out": nn.Linear(12, 8)}
        parts["cell"].requires_grad_(False)
        return nn.ModuleDict(parts)

    def features(self, step):
        return self.model["input"](self.normal(step, 8, 6)).tanh()

    def loss(self, step):
        return to_target(self.model["out"](self.through(step, self.features(step)).tanh()))


class FrozenCellsMayRunManyTimes(_Frozen):
    """A frozen recurrent cell"""

    def through(self, step, h):
        for _ in range(3):
            h = self.model["cell"](h).tanh()
        return h


class FrozenLayersMayBeMultipliedTwice(_Frozen):
    """A frozen layer is called, and its weight is multiplied once more"""

    def through(self, step, h):
        return self.model["cell"](h) + F.linear(h, self.model["cell"].weight)


class FrozenLayersMayNeverBeCalled(_Frozen):
    """A frozen weight that is multiplied, and whose layer is never called"""

    def through(self, step, h):
        return F.linear(h, self.model["cell"].weight)


class FrozenLayersMayBeBypassedMidway(_Frozen):
    """The same, from the fourth step on; before, the layer is called"""

    def through(self, step, h):
        return self.model["cell"](h) if step < 3 else F.linear(h, self.model["cell"].weight)


class FrozenLayersMayBeBypassedInHalves(FrozenLayersMayBeBypassedMidway):
    """A frozen layer is bypassed from the fourth step on, with opt.ascent() and opt.descent()"""

    halves = True

    def step(self, step):
        self.driver.halves(lambda: self.backward(step))
        self.driver.update()


class FrozenLayersMayBeBypassedInCoarsePrecision(_Frozen):
    """A frozen layer that is called, and multiplied once more from the fourth step on, in an opt.step(closure)"""

    dtypes = ALL

    def step(self, step):
        self.driver.closure(lambda: self.backward(step))

    def through(self, step, h):
        y = self.model["cell"](h)
        return y if step < 3 else y + F.linear(h, self.model["cell"].weight)


class FrozenWeightsMayBeRead(_Frozen):
    """A frozen weight's norm, taken without a gradient, as adapters of its direction do"""

    dtypes = ALL

    def through(self, step, h):
        return self.model["cell"](h) * (1 + self.model["cell"].weight.detach().norm(dim=1))


class FrozenLayersMayBeComputedOtherwise(_Frozen):
    """nn.Linear.forward is patched around a frozen layer, from the fourth step on"""

    def through(self, step, h):
        with pytest.MonkeyPatch.context() as patch:
            if step >= 3:
                patch.setattr(nn.Linear, "forward", lambda layer, x: F.linear(x, layer.weight.square(), layer.bias))
            return self.model["cell"](h)


class FrozenWeightsMayHaveAnOldGradient(_Frozen):
    """A gradient was left on a weight when it was frozen"""

    def prepare(self):
        weight = self.model["cell"].weight
        weight.grad = 0.1 + weight.detach()

    def through(self, step, h):
        return self.model["cell"](h)


class FrozenLayersMayBeSkipped(_Frozen):
    """A frozen layer that the third and fifth step leave out"""

    def through(self, step, h):
        return h if step in (2, 4) else self.model["cell"](h)


class FrozenLayersMayBeCalledMoreOftenMidway(_Frozen):
    """A frozen layer that is called twice in the fourth step, and has two backwards from the fifth on"""

    def backward(self, step):
        super().backward(step)
        if step >= 4:
            super().backward(step + 50)

    def through(self, step, h):
        h = self.model["cell"](h)
        return self.model["cell"](h.tanh()) if step == 3 else h


class FrozenWeightsMayBeDecayed(_Frozen):
    """A penalty on the product of a frozen weight and a trained one"""

    def loss(self, step):
        merged = self.model["out"].weight @ self.model["cell"].weight
        return super().loss(step) + 0.1 * merged.square().sum()

    def through(self, step, h):
        return self.model["cell"](h)


class FrozenTablesMayBeTied(_Frozen):
    """A frozen language model whose head is its table"""

    def build(self):
        parts = {"table": nn.Embedding(10, 12), "body": nn.Linear(12, 12), "head": nn.Linear(12, 10, bias=False)}
        parts["head"].weight = parts["table"].weight
        parts["table"].requires_grad_(False)
        return nn.ModuleDict(parts)

    def loss(self, step):
        h = self.model["body"](1 + self.model["table"](self.whole(step, 10, 8)))
        return to_target(self.model["head"](1 + h)[:, :3])


class FrozenTablesMayBeTiedThrice(FrozenTablesMayBeTied):
    """The same, whose table is multiplied once more from the fourth step on"""

    def loss(self, step):
        extra = self.model["table"](self.whole(step, 10, 8)) @ self.model["table"].weight.T if step >= 3 else 0
        return super().loss(step) + to_target(extra + self.model["body"].bias[:10])


class _FrozenBlock(_Frozen):
    reentrant = True

    def build(self):
        parts = {"input": nn.Linear(6, 12), "cell": mlp(12, 12, 12), "out": nn.Linear(12, 8)}
        parts["cell"].requires_grad_(False)
        return nn.ModuleDict(parts)

    def through(self, step, h):
        return checkpoint(self.model["cell"], h, use_reentrant=self.reentrant)


class FrozenBlocksMayBeCheckpointed(_FrozenBlock):
    """A frozen block in a re-entrant checkpoint"""


class FrozenBlocksMayBeRecomputed(_FrozenBlock):
    """A frozen block in a checkpoint that is not re-entrant"""

    reentrant = False


class LayersMayBeFrozenForPartOfALoss(Loop):
    """From the sixth step on one term of the loss goes through layers that are frozen for its forward"""

    steps = 7

    def backward(self, step):
        x = self.normal(step, 8, 6)
        loss = to_target(self.model(x))
        if step >= 5:
            self.model.requires_grad_(False)
            shift = torch.zeros_like(x).requires_grad_()
            loss = loss + to_target(self.model(x + shift), 0.5)
            self.model.requires_grad_(True)
        loss.backward()
