"""Gradients inside the loss"""

import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _Scalar(Loop):
    def build(self):
        return mlp(6, 12, 12, 1)


class AGradientPenaltyIsDifferentiated(_Scalar):
    """WGAN-GP: the norm of the critic's input gradient in the loss"""

    dtypes = ALL

    def loss(self, step):
        real, fake = self.normal(step, 8, 6), self.normal(step + 50, 8, 6, shift=0)
        between = (0.3 * real + 0.7 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.model(between).sum(), between, create_graph=True)
        return self.model(fake).mean() - self.model(real).mean() + 3 * (slope.norm(dim=1) - 1).square().mean()


class APenaltyMayComeEveryThirdStep(_Scalar):
    """StyleGAN's lazy R1: the input gradient's penalty in every third step only"""

    dtypes = ALL
    steps = 9

    def loss(self, step):
        real = self.normal(step, 8, 6).requires_grad_(step % 3 == 2)
        score = self.model(real)
        loss = F.softplus(-score).mean()
        if step % 3 == 2:
            (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
            loss = loss + 3 * slope.square().sum(1).mean()
        return loss


class ForcesAreGradients(_Scalar):
    """Interatomic forces: energies and their negative gradients are both fitted"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        energy = self.model(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return to_target(energy) + to_target(-slope, 0.5)


class ForcesAloneAreEnough(_Scalar):
    """Forces alone are fitted: weights are reached through the double backward only"""

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Softplus(), nn.Linear(12, 12), nn.Softplus(), nn.Linear(12, 1))

    def loss(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        return to_target(-slope, 0.5)


class SecondDerivativesAreDifferentiated(Loop):
    """A physics-informed net: u'' in the loss, and the boundary"""

    dtypes = DOUBLE

    def build(self):
        return mlp(1, 12, 12, 1)

    def loss(self, step):
        x = self.normal(step, 8, 1).requires_grad_()
        u = self.model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return (ddu + u - 1).square().mean() + to_target(self.model(torch.ones_like(x[:1])), 0.5)


class AJacobianPerSampleMayBeTaken(Loop):
    """A Jacobian penalty by vmap and jacrev"""

    def loss(self, step):
        x = self.normal(step, 4, 6)
        jacobians = vmap(jacrev(self.model))(x)
        return to_target(self.model(x)) + 0.3 * jacobians.square().sum((1, 2)).mean()


class ATangentMayBePushedForward(Loop):
    """A directional derivative by forward-mode AD in the loss"""

    def loss(self, step):
        x = self.normal(step, 8, 6)
        y, slope = jvp(self.model, (x,), (torch.ones_like(x),))
        return to_target(y) + 0.3 * slope.square().mean()


class GradientsOfTasksMayBeMeasured(Loop):
    """GradNorm: losses are weighed by the norms of their gradients over the last shared matrix"""

    def loss(self, step):
        h = self.model[:4](self.normal(step, 8, 6))
        tasks = [to_target(self.model[4](h)), self.model[4](h).abs().mean()]
        norms = [torch.autograd.grad(task, self.model[2].weight, retain_graph=True)[0].norm() for task in tasks]
        return sum(task * (sum(norms) / norm).detach() for task, norm in zip(tasks, norms, strict=True))


class GradientsMayBeAssignedByHand(Loop):
    """PCGrad: each task's gradient over all parameters, projected, then written into .grad"""

    dtypes = ALL

    def backward(self, step):
        y = self.model(self.normal(step, 8, 6))
        parameters = list(self.model.parameters())
        tasks = to_target(y), y[:, 0].square().mean()
        flat = []
        for task in tasks:
            gradients = torch.autograd.grad(task, parameters, retain_graph=True)
            flat.append(torch.cat([g.flatten() for g in gradients]))
        dot = flat[0] @ flat[1]
        projected = flat[0] + flat[1] - torch.where(dot < 0, dot / flat[1].square().sum(), 0) * flat[1]
        for p, g in zip(parameters, projected.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p).clone()


class _Meta(Loop):
    second_order = False

    def loss(self, step):
        names, weights = zip(*self.model.named_parameters(), strict=True)
        inner = to_target(self.model(self.normal(step, 8, 6)))
        gradients = torch.autograd.grad(inner, weights, create_graph=self.second_order)
        adapted = {n: w - 0.1 * g for n, w, g in zip(names, weights, gradients, strict=True)}
        return to_target(functional_call(self.model, adapted, (self.normal(step + 50, 8, 6),)))


class AnInnerStepMayBeFirstOrder(_Meta):
    """First-order MAML: an inner gradient step, then a loss of the adapted weights by functional_call"""


class AnInnerStepMayBeDifferentiated(_Meta):
    """MAML: the same, differentiated through the inner step"""

    dtypes = DOUBLE
    second_order = True


class InnerStepsMayLeaveAGradientBehind(Loop):
    """Reptile: some inner steps on copies, whose difference is written into .grad"""

    dtypes = DOUBLE

    def backward(self, step):
        weights = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        for k in range(2):
            loss = to_target(functional_call(self.model, weights, (self.normal(step + 50 * k, 8, 6),)))
            gradients = torch.autograd.grad(loss, list(weights.values()))
            moved = zip(weights.items(), gradients, strict=True)
            weights = {n: (w - 0.1 * g).detach().requires_grad_() for (n, w), g in moved}
        for name, p in self.model.named_parameters():
            p.grad = (p - weights[name]).detach()


class ClassActivationMapsMayBeRegularized(Loop):
    """Grad-CAM in the loss: the gradient over a hidden layer's features, differentiated"""

    dtypes = DOUBLE

    def loss(self, step):
        h = self.model[:2](self.normal(step, 8, 6))
        y = self.model[2:](h)
        (slope,) = torch.autograd.grad(y[:, 0].sum(), h, create_graph=True)
        return to_target(y) + (F.softplus(slope) * h).square().mean()


class RetainedGradientsMayBeLearnedFrom(Loop):
    """retain_grad on hidden features, whose gradient makes the second loss"""

    dtypes = DOUBLE

    def backward(self, step):
        x = self.normal(step, 8, 6)
        h = self.model[:2](x)
        h.retain_grad()
        to_target(self.model[2:](h)).backward()
        ((self.model[:2](x) * h.grad.sign()).mean()).backward()


class OnlySomeInputsMayGetGradients(Loop):
    """backward(inputs=[...]): the head learns from one loss, the body from another"""

    dtypes = DOUBLE

    def backward(self, step):
        y = self.model(self.normal(step, 8, 6))
        to_target(y).backward(inputs=list(self.model[4].parameters()), retain_graph=True)
        to_target(y, -1).backward(inputs=list(self.model[:4].parameters()))


class AttentionIsDifferentiatedTwice(Loop):
    """A penalty on the input gradient through softmax attention"""

    dtypes = DOUBLE
    rho = 0.5

    def build(self):
        return nn.ModuleDict({name: nn.Linear(6, 12) for name in "qkv"} | {"out": nn.Linear(12, 1)})

    def loss(self, step):
        x = self.normal(step, 4, 3, 6).requires_grad_()
        q, k, v = (self.model[name](x) for name in "qkv")
        y = self.model["out"]((q @ k.mT).softmax(-1) @ v)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return to_target(y) + slope.square().mean()


class TheGradientsNormMayBePenalized(Loop):
    """A penalty on the norm of the loss's gradient over all weights"""

    dtypes = DOUBLE

    def loss(self, step):
        loss = to_target(self.model(self.normal(step, 8, 6)))
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in gradients)


class GradientsMayBeLoggedNowAndThen(Loop):
    """A norm of the gradient and a saliency map are logged in the fourth and sixth step"""

    dtypes = ALL

    def loss(self, step):
        x = self.normal(step, 8, 6)
        if step in (3, 5):
            x.requires_grad_()
        loss = to_target(self.model(x))
        if step in (3, 5):
            parameters = list(self.model.parameters())
            self.norm = sum(float(g.norm()) for g in torch.autograd.grad(loss, parameters, retain_graph=True))
            self.saliency = torch.autograd.grad(loss, x, retain_graph=True)[0].abs().mean(0)
        return loss


class AFixedPointsBackwardMayBeSolved(Loop):
    """A deep equilibrium model: a hook solves for the gradient with vector-Jacobian products of its layer"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"cell": nn.Linear(12, 12), "input": nn.Linear(6, 12), "out": nn.Linear(12, 8)})

    def prepare(self):
        with torch.no_grad():
            self.model["cell"].weight.mul_(0.5)

    def loss(self, step):
        def f(z):
            return (self.model["cell"](z) + injected).tanh()

        injected = self.model["input"](self.normal(step, 8, 6))
        with torch.no_grad():
            z = torch.zeros_like(injected)
            for _ in range(20):
                z = f(z)
        z = f(z)
        z0 = z.detach().requires_grad_()
        f0 = f(z0)

        def solve(gradient):
            found = gradient
            for _ in range(20):
                found = torch.autograd.grad(f0, z0, found, retain_graph=True)[0] + gradient
            return found

        z.register_hook(solve)
        return to_target(self.model["out"](z))


class AnAdjointMayUseItsOwnGraph(Loop):
    """A neural ODE's adjoint: a function whose backward runs the layer again and differentiates it over its weights"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"field": mlp(12, 12, 12), "lift": nn.Linear(6, 12), "out": nn.Linear(12, 8)})

    def loss(self, step):
        z = self.model["lift"](self.normal(step, 8, 6))
        z = _Adjoint.apply(self.model["field"], z, *self.model["field"].parameters())
        return to_target(self.model["out"](z))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, field, z, *parameters):
        ctx.field = field
        ctx.save_for_backward(z, *parameters)
        for _ in range(3):
            z = z + 0.3 * field(z)
        return z

    @staticmethod
    def backward(ctx, gradient):
        z, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            end = z
            for _ in range(3):
                end = end + 0.3 * ctx.field(end)
            return None, *torch.autograd.grad(end, [z, *parameters], gradient)


class GradientsInsideMayBeBatched(Loop):
    """A Jacobian of the outputs by autograd.grad(is_grads_batched=True, create_graph=True) in the loss"""

    dtypes = DOUBLE

    def backward(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        y = self.model(x)
        directions = torch.eye(3, dtype=y.dtype)[:, None].expand(3, *y.shape)
        (jacobian,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, create_graph=True)
        (to_target(y) + jacobian.square().mean()).backward()
