"""Layers that become others"""

import pytest
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
