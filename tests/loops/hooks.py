"""Hooks on weights"""

import torch
from torch import nn

from tests.loops.loop import ALL, DOUBLE, Loop, to_target


class _Hooked(Loop):
    at = 0  # the step before which hooks are made

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))

    def step(self, step):
        if step == self.at:
            self.handle = self.hook(self.model[2].weight)
        super().step(step)

    def hook(self, weight):
        raise NotImplementedError


class GradientsMayBeMasked(_Hooked):
    """A pruning mask by a hook on the weight"""

    dtypes = ALL

    def hook(self, weight):
        mask = (weight.detach() > -0.1).to(self.dtype)
        return weight.register_hook(lambda gradient: gradient * mask)


class GradientsMayBeMaskedMidway(GradientsMayBeMasked):
    """A mask whose hook comes in the fourth step"""

    dtypes = ALL
    at = 3


class GradientsMayBeClamped(_Hooked):
    """A hook that clamps the gradient"""

    def hook(self, weight):
        return weight.register_hook(lambda gradient: gradient.clamp(-0.02, 0.05))


class GradientsMayBeWatched(_Hooked):
    """Histograms of gradients by a hook that returns None, as wandb's"""

    def hook(self, weight):
        self.seen = []

        def watch(gradient):
            self.seen.append(gradient.detach().double().histc(8))

        return weight.register_hook(watch)

    def step(self, step):
        super().step(step)
        assert self.seen[-1].sum() == 144


class GradientsMayBeWatchedAndLetGo(GradientsMayBeWatched):
    """The same, for three steps only"""

    dtypes = DOUBLE

    def step(self, step):
        if step < 3:
            return super().step(step)
        self.handle.remove()
        return _Hooked.step(self, step)


class ACarefulHookIsCalledToo(_Hooked):
    """A hook that bears None, and halves rows of what is not"""

    dtypes = DOUBLE

    def hook(self, weight):
        rows = torch.linspace(0, 1, 12, dtype=self.dtype)[:, None]
        return weight.register_hook(lambda gradient: None if gradient is None else gradient * rows)


class CompleteGradientsMayBeChanged(_Hooked):
    """A post-accumulate hook that scales what is in .grad"""

    dtypes = ALL

    def hook(self, weight):
        rows = torch.linspace(1, 0, 12, dtype=self.dtype)[:, None]

        def scale(p):
            p.grad.mul_(rows)

        return weight.register_post_accumulate_grad_hook(scale)


class GradientsMayBeMaskedAtTheirNode(_Hooked):
    """A pre-hook on the node that accumulates a weight's gradient"""

    dtypes = DOUBLE

    def hook(self, weight):
        self.node = weight.expand_as(weight).grad_fn.next_functions[0][0]
        mask = (weight.detach() > -0.1).to(self.dtype)
        return self.node.register_prehook(lambda gradients: (gradients[0] * mask,))


class AllGradientsMayBeWatchedTogether(_Hooked):
    """register_multi_grad_hook over all parameters"""

    dtypes = DOUBLE

    def hook(self, weight):
        self.seen = []
        parameters = list(self.model.parameters())

        def watch(gradients):
            self.seen.append([g is not None for g in gradients])

        return torch.autograd.graph.register_multi_grad_hook(parameters, watch)


class HooksOnFeaturesMayScale(_Hooked):
    """A hook on hidden features that scales their gradient, in the fifth and sixth step"""

    dtypes = DOUBLE

    def step(self, step):
        Loop.step(self, step)

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        if step in (4, 5):
            h.register_hook(lambda gradient: 0.5 * gradient)
        return to_target(self.model[2:](h))


class OldTokensMayStayAsTheyAre(Loop):
    """New tokens only: a hook zeroes the gradient of a table's old rows, which must not be displaced either"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(20, 12), "out": nn.Linear(12, 8)})

    def prepare(self):
        new = (torch.arange(20) >= 12).to(self.dtype)[:, None]
        self.model["table"].weight.register_hook(lambda gradient: gradient * new)

    def loss(self, step):
        return to_target(self.model["out"](1 + self.model["table"](self.whole(step, 20, 12))))
