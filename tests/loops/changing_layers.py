"""Layers that become others"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.loops.loop import ALL, DOUBLE, Loop, to_target


class AForwardMayBeReplaced(Loop):
    """A layer's forward is replaced on the instance, as quantizers and patchers do"""

    dtypes = ALL

    def prepare(self):
        layer = self.model[2]
        forward = layer.forward
        layer.forward = lambda x: forward(x) + 0.1 * x.sum(1, keepdim=True) * layer.weight.mean()

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class AForwardMayBeReplacedMidway(Loop):
    """The same, replaced in the fourth step"""

    dtypes = ALL

    def step(self, step):
        if step == 3:
            layer = self.model[2]
            layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
        super().step(step)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class ALayersClassMayChangeMidway(Loop):
    """layer.__class__ is assigned in the fourth step, as conversions do"""

    def step(self, step):
        if step == 3:
            self.model[2].__class__ = _Doubled
        super().step(step)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class AClassMayBePatchedMidway(Loop):
    """nn.Linear.forward is patched from the fourth step on"""

    dtypes = DOUBLE

    def backward(self, step):
        with pytest.MonkeyPatch.context() as patch:
            if step >= 3:
                patch.setattr(nn.Linear, "forward", lambda layer, x: 1.3 * F.linear(x, layer.weight, layer.bias))
            super().backward(step)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class AClassMayBePatchedInTheLoss(Loop):
    """nn.Linear.forward is patched inside the loss, from the fourth step on"""

    dtypes = ALL
    begins = 3

    def loss(self, step):
        with pytest.MonkeyPatch.context() as patch:
            if step >= self.begins:
                patch.setattr(nn.Linear, "forward", _as_leaning)
            return to_target(self.model(self.normal(step, 8, 6)))


class AClassMayAlwaysBePatchedInTheLoss(AClassMayBePatchedInTheLoss):
    """The same, in every step"""

    dtypes = DOUBLE
    begins = 0


class AClassMayBePatchedForGood(Loop):
    """nn.Linear.forward is patched before there is an optimizer"""

    dtypes = DOUBLE

    def prepare(self):
        self.patch = pytest.MonkeyPatch()

    def optimizers(self):
        with self.patch.context() as patch:
            patch.setattr(nn.Linear, "forward", _as_leaning)
            return super().optimizers()

    def step(self, step):
        with self.patch.context() as patch:
            patch.setattr(nn.Linear, "forward", _as_leaning)
            super().step(step)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


def _as_leaning(layer, x):
    lean = torch.linspace(0.5, 1.5, layer.in_features, dtype=x.dtype)
    return F.linear(x, layer.weight * lean, layer.bias)


class AnAttentionsClassMayBePatchedInTheLoss(Loop):
    """nn.MultiheadAttention.forward is patched inside the loss, from the fourth step on"""

    dtypes = DOUBLE

    def build(self):
        attention = nn.MultiheadAttention(12, 2, batch_first=True)
        return nn.ModuleDict({"input": nn.Linear(6, 12), "attention": attention})

    def loss(self, step):
        own = nn.MultiheadAttention.forward

        def forward(layer, h, *args, **kwargs):
            return own(layer, h, *args, **kwargs)[0] + F.linear(h, layer.out_proj.weight), None

        with pytest.MonkeyPatch.context() as patch:
            if step >= 3:
                patch.setattr(nn.MultiheadAttention, "forward", forward)
            h = self.model["input"](self.normal(step, 4, 3, 6))
            return to_target(self.model["attention"](h, h, h, need_weights=False)[0])


class AFunctionMayBePatched(Loop):
    """F.linear is patched inside the loss"""

    dtypes = ALL
    begins = 0

    def loss(self, step):
        own = F.linear

        def leaning(x, W, bias=None):
            return own(x, W, bias) * torch.linspace(0.5, 1.5, len(W), dtype=x.dtype)

        with pytest.MonkeyPatch.context() as patch:
            if step >= self.begins:
                patch.setattr(F, "linear", leaning)
            return to_target(self.model(self.normal(step, 8, 6)))


class AFunctionMayBePatchedMidway(AFunctionMayBePatched):
    """F.linear is patched inside the loss, from the fourth step on"""

    dtypes = DOUBLE
    begins = 3


class AForwardMayBeReplacedInTheLoss(Loop):
    """A layer's forward is wrapped on the instance, inside the fourth step's first pass"""

    def loss(self, step):
        layer = self.model[2]
        if step == 3 and not hasattr(layer, "wrapped"):
            layer.wrapped = layer.forward
            layer.forward = lambda x: layer.wrapped(x) * torch.linspace(0.5, 1.5, 12, dtype=x.dtype)
        return to_target(self.model(self.normal(step, 8, 6)))


class AForwardMayBeKeptFromAPass(Loop):
    """layer.forward, kept from the first pass on, is what is called"""

    dtypes = DOUBLE
    forward = None

    def loss(self, step):
        self.forward = self.forward or self.model[2].forward
        return to_target(self.model[3:](self.forward(self.model[:2](self.normal(step, 8, 6)))))


class AParametrizationMayComeMidway(Loop):
    """A weight is parametrized in the fourth step"""

    dtypes = DOUBLE

    def step(self, step):
        if step == 3:
            parametrize.register_parametrization(self.model[2], "weight", _Bounded())
        super().step(step)

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class _Bounded(nn.Module):
    def forward(self, W):
        return (2 * W).tanh()


class ABoundForwardMayBeKept(Loop):
    """layer.forward, kept from before there was an optimizer, is what is called"""

    dtypes = DOUBLE

    def prepare(self):
        self.forward = self.model[2].forward

    def loss(self, step):
        return to_target(self.model[3:](self.forward(self.model[:2](self.normal(step, 8, 6)))))


class AnOutputMayLoseItsGradientMidway(Loop):
    """A layer's output is used without its gradient in the fourth step"""

    dtypes = DOUBLE

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        y = self.model[2](h).tanh()
        return to_target(self.model[4](h + y.detach() if step == 3 else y))
