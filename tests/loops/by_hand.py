"""Gradients read and written by hand"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tests.loops.loop import DOUBLE, FULL, Loop, to_target


class _ByHand(Loop):
    dtypes = DOUBLE

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class GradientsMayBeClearedInThePass(_ByHand):
    """The base's zero_grad at the start of each pass"""

    def backward(self, step):
        self.driver.base.zero_grad()
        super().backward(step)


class GradientsMayBeClearedLate(_ByHand):
    """model.zero_grad(set_to_none=False) between forward and backward"""

    def backward(self, step):
        loss = self.loss(step)
        self.model.zero_grad(set_to_none=False)
        loss.backward()


class GradientsMayBeClippedInThePass(_ByHand):
    """clip_grad_norm_ in each pass"""

    def backward(self, step):
        super().backward(step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)


class GradientsMayGetNoise(_ByHand):
    """Noise is added to .grad in each pass"""

    dtypes = FULL

    def backward(self, step):
        super().backward(step)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.add_(0.02 * self.normal(step, *p.shape))


class GradientsMayBeWrittenMidway(_ByHand):
    """Rows of .grad are zeroed in each pass, from the fourth step on"""

    dtypes = FULL

    def backward(self, step):
        super().backward(step)
        for p in self.model.parameters():
            if step >= 3 and p.grad is not None:
                p.grad[: len(p) // 2] = 0


class GradientsMayBeScaledNowAndThen(_ByHand):
    """Where a step's loss is large, .grad is scaled down in each pass"""

    def backward(self, step):
        super().backward(step)
        if step % 3 == 2:
            there = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient, factor in zip(there, (0.3, 0.7) * len(there), strict=False):
                gradient[0] *= factor


class GradientsMayOnlyBeLookedAt(_ByHand):
    """The norm of all gradients is written down in each pass"""

    def backward(self, step):
        super().backward(step)
        self.norms = [float(p.grad.norm()) for p in self.model.parameters() if p.grad is not None]


class GradientsMayBeReplacedOnTheirLayer(_ByHand):
    """weight.grad = a new tensor made from the old one, from the third step on"""

    def backward(self, step):
        super().backward(step)
        for layer in self.model.modules():
            if step >= 2 and isinstance(layer, nn.Linear) and layer.weight.grad is not None:
                layer.weight.grad = layer.weight.grad.flip(0)


class GradientsMayBeOfEachSample(_ByHand):
    """Differentially private SGD: vmap(grad) gives every sample's gradient, clipped and averaged into .grad"""

    def backward(self, step):
        weights = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(weights, x):
            return to_target(functional_call(self.model, weights, (x[None],)))

        each = vmap(grad(loss), in_dims=(None, 0))(weights, self.normal(step, 8, 6))
        for name, p in self.model.named_parameters():
            p.grad = each[name].clamp(-0.5, 0.5).mean(0)


class GradientsMayComeFromAFunction(_ByHand):
    """torch.func.grad over the parameters themselves, assigned to .grad"""

    def backward(self, step):
        parameters = dict(self.model.named_parameters())
        x = self.normal(step, 8, 6)
        found = grad(lambda weights: to_target(functional_call(self.model, weights, (x,))))(parameters)
        for name, p in parameters.items():
            p.grad = found[name].detach()


class GradientsMayBeAssignedMidway(_ByHand):
    """.grad is assigned from autograd.grad in the fourth and sixth step, and comes from backward in the others"""

    def backward(self, step):
        if step not in (3, 5):
            return super().backward(step)
        parameters = list(self.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(self.loss(step), parameters), strict=True):
            p.grad = 2 * g + 0.1 * p.detach()
        return None


class GradientsMayBeDifferentiatedByBackward(_ByHand):
    """backward(create_graph=True), and a second backward of what is in .grad"""

    def backward(self, step):
        self.loss(step).backward(create_graph=True)
        penalty = 0.1 * sum(p.grad.square().sum() for p in self.model.parameters() if p.grad is not None)
        if penalty:
            penalty.backward()
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad = p.grad.detach()


class ABackwardMayBeTakenBack(_ByHand):
    """Backward, zero_grad, and the same graph's backward again"""

    def backward(self, step):
        loss = self.loss(step)
        loss.backward(retain_graph=True)
        self.model.zero_grad()
        loss.backward()


class LossesMayBeAList(_ByHand):
    """torch.autograd.backward of two losses at once"""

    def backward(self, step):
        y = self.model(self.normal(step, 8, 6))
        torch.autograd.backward([to_target(y), (0.2 * y).square().mean()])


class GradientsMayBeClampedThroughData(_ByHand):
    """p.grad.data.clamp_ in each pass, from the sixth step on, if there is a gradient: it leaves no version behind"""

    steps = 7

    def backward(self, step):
        super().backward(step)
        for p in self.model.parameters():
            if step >= 5 and p.grad is not None:
                p.grad.data.clamp_(-0.01, 0.01)


class GradientsMayBeClampedWithoutEffect(_ByHand):
    """p.grad.clamp_ in each pass, which clamps nothing in the first steps"""

    dtypes = FULL

    def backward(self, step):
        super().backward(step)
        for p in self.model.parameters():
            p.grad.clamp_(-(bound := 1e3 if step < 3 else 0.01), bound)


class GradientsOfBiasesMayBeScaled(_ByHand):
    """Biases learn at twice the rate: their .grad is doubled in each pass"""

    def backward(self, step):
        super().backward(step)
        for name, p in self.model.named_parameters():
            if name.endswith("bias"):
                p.grad.mul_(2)


class GradientsMayBeLoggedInThePass(_ByHand):
    """The norms of all gradients are logged in each pass, which does not ask whether there are any"""

    def backward(self, step):
        super().backward(step)
        self.logged = [float(p.grad.norm()) for p in self.model.parameters()]
