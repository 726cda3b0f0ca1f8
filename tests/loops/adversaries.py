"""Adversarial examples"""

import torch
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, to_target


class AttackGradientsAreNoPartOfEpsilon(Loop):
    """FGSM: the sign of an input gradient makes the samples that are learned"""

    dtypes = ALL

    def loss(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        (slope,) = torch.autograd.grad(to_target(self.model(x)), x)
        return to_target(self.model(x.detach() + 0.2 * slope.sign()))


class AnAttackMayCallBackward(Loop):
    """FGSM as tutorials have it: backward for the input gradient, the weights' cleared, then the loss"""

    dtypes = ALL

    def backward(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        to_target(self.model(x)).backward()
        self.model.zero_grad()
        to_target(self.model(x.detach() + 0.2 * x.grad.sign())).backward()


class AttacksMayTakeSeveralSteps(Loop):
    """PGD: three input gradients before the loss"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 8, 6)
        delta = torch.zeros_like(x)
        for _ in range(3):
            delta.requires_grad_()
            (slope,) = torch.autograd.grad(to_target(self.model(x + delta)), delta)
            delta = (delta + 0.1 * slope.sign()).clamp(-0.2, 0.2).detach()
        return to_target(self.model(x + delta))


class VirtualAdversariesMayBeSearched(Loop):
    """Virtual adversarial training: a power iteration on the input from a drawn direction"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 8, 6)
        y = self.model(x)
        with torch.no_grad():
            clean = self.model(x)
        d = F.normalize(self.noise(8, 6)).requires_grad_()
        (d,) = torch.autograd.grad(F.mse_loss(self.model(x + 0.1 * d), clean), d)
        return to_target(y) + F.mse_loss(self.model(x + 0.5 * F.normalize(d)), clean + 1)


class APerturbationOfInputsMayBeKept(Loop):
    """Free adversarial training: one backward gives the weights' gradient and the input's, kept for the next step"""

    dtypes = DOUBLE

    def prepare(self):
        self.delta = torch.zeros(8, 6, dtype=self.dtype)

    def backward(self, step):
        self.input = self.normal(step, 8, 6).add_(self.delta).requires_grad_()
        to_target(self.model(self.input)).backward()

    def step(self, step):
        super().step(step)
        self.delta = (self.delta + 0.125 * self.input.grad.sign()).clamp(-0.25, 0.25)
