"""How sharp the loss is around a model's weights: the worst increase in two norm balls, and the Hessian."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from nusam.distributed.blocks import is_sharded
from nusam.guards.checks import check_count, check_radius
from nusam.guards.model_guard import RandomState
from nusam.interrupts import always
from nusam.lmo import L2, LMO, Dense, Nuclear, Perturbation
from nusam.power_iteration import working_dtype

__all__ = ["Sharpness", "sharpness"]

Loss = Callable[[nn.Module], Tensor]

POWER_ITERATIONS = 20  # a step of the nuclear ascent; its warm start goes on to improve from step to step


@dataclass(frozen=True)
class Sharpness:
    """What :func:`sharpness` found, in units of the loss (``hessian``: per squared unit of the weights)."""

    loss: float
    """At the weights as they are."""
    l2: float
    """Largest increase found with ‖ε‖₂ ≤ ρ over all trainable parameters together; at least 0."""
    nuclear: float
    """Largest increase found with ‖ε_i‖_* ≤ ρ for every trainable 2-D parameter; at least 0."""
    hessian: float
    """Hessian eigenvalue of the largest magnitude, with its sign; NaN where it was left out."""


def sharpness(
    model: nn.Module,
    loss: Loss,
    rho: float = 0.05,
    *,
    steps: int = 5,
    hessian_iterations: int = 20,
    seed: int = 0,
) -> Sharpness:
    """Measure how much a fixed batch's loss can grow near the weights, and how curved it is.

    Both increases are lower bounds of the true maximum: the best of ``steps`` points that conditional-gradient
    steps reach inside the ball, the first of them being SAM's and νSAM's own. The model is left exactly as it was
    found, also after an exception: weights, buffers, gradients, flags, modes and torch's random generators. It is
    evaluated in the mode it is in; batch norm in training mode uses the batch's statistics, and dropout draws the
    same masks every time. Costs ``steps`` forward and backward passes for each ball, ``hessian_iterations``
    double backward passes, and memory for about four copies of the weights.

    Weights below float32 round most of a small ε away; measure a float32 copy of such a model.

    Args:
        model: the bare module, neither compiled (unless ``hessian_iterations=0``) nor wrapped or sharded.
        loss: gets the model and returns the loss of always the same batch, a 0-d tensor.
        rho: radius of both balls.
        steps: ascent steps in each ball, at least 1.
        hessian_iterations: Hessian-vector products of the power iteration; 0 leaves the Hessian out, for models
            with an operation that has no second derivative.
        seed: of the start vectors, at least 0.

    Raises:
        TypeError: if the model is no bare module, or the loss is not callable or returns no tensor.
        ValueError: if a number is out of range, nothing is trainable, or the loss is not 0-d or has no gradient.
        NotImplementedError: if a parameter is sharded.
    """
    check_radius(rho)
    check_count("steps", steps, 1)
    check_count("hessian_iterations", hessian_iterations)
    check_count("seed", seed)
    surface = _Surface(_checked_model(model), loss)
    with torch.enable_grad(), always(surface.restore):
        value, gradients = surface.begin()
        l2 = _worst_increase(surface, value, gradients, L2(), rho, steps, seed)
        nuclear = _worst_increase(surface, value, gradients, Nuclear(POWER_ITERATIONS), rho, steps, seed)
        hessian = _top_eigenvalue(surface, hessian_iterations, seed) if hessian_iterations else math.nan
    return Sharpness(value, l2, nuclear, hessian)


class _Surface:
    """The loss over displacements of the trainable parameters, and the way back to where it began."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        if not callable(loss):
            raise TypeError(
                f"loss must be a function of the model, got {type(loss).__name__}; pass lambda model: <its loss>."
            )
        self.model = model
        self.loss = loss
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("The model has no trainable parameter to displace; set requires_grad on some.")
        self._starts = [p.detach().clone() for p in self.parameters]
        self._buffers = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in model.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]
        self._gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._random = RandomState(model.parameters())

    def restore(self) -> None:
        """Leave the model and the generators as they were found; bears repetition."""
        self._move([None] * len(self.parameters))
        self._rewind()
        for parameter, gradient, trainable in self._gradients:
            parameter.requires_grad_(trainable)
            parameter.grad = gradient

    def begin(self) -> tuple[float, list[Tensor]]:
        """Put aside what ``.grad`` holds; the loss at the weights as they are, and its gradients."""
        for parameter, _, _ in self._gradients:
            parameter.grad = None
        return self.displaced([None] * len(self.parameters))

    def hessian(self) -> "_Hessian":
        """The Hessian at the weights as they are."""
        self._move([None] * len(self.parameters))
        return _Hessian(self.parameters, self.gradients(self.evaluate(), create_graph=True))

    def displaced(self, epsilons: list[Tensor | None]) -> tuple[float, list[Tensor]]:
        """The loss with its ε (None: nothing) added to every trainable parameter, and its gradients there."""
        self._move(epsilons)
        loss = self.evaluate()
        return float(loss.detach()), self.gradients(loss)

    def evaluate(self) -> Tensor:
        """The loss where the weights are, with the same random numbers and buffers every time."""
        self._rewind()
        value: Any = self.loss(self.model)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a 0-d tensor, got {type(value).__name__}; return the loss itself.")
        if value.ndim:
            raise ValueError(
                f"loss must return a 0-d tensor, got one of shape {tuple(value.shape)}; return its mean or its sum."
            )
        if not value.requires_grad:
            raise ValueError(
                "loss returned a tensor without a gradient, and the ascent needs one; compute it from the model's "
                "output, without detach() or no_grad()."
            )
        return value

    def gradients(self, loss: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Of the trainable parameters; zero where one is unused."""
        return list(torch.autograd.grad(loss, self.parameters, create_graph=create_graph, materialize_grads=True))

    def _move(self, epsilons: list[Tensor | None]) -> None:
        with torch.no_grad():
            for parameter, start, epsilon in zip(self.parameters, self._starts, epsilons, strict=True):
                parameter.copy_(start if epsilon is None else start + epsilon)

    def _rewind(self) -> None:
        with torch.no_grad():
            for owner, name, buffer, content in self._buffers:
                setattr(owner, name, buffer)
                if not torch.equal(buffer, content):  # expanded buffers can't be written, and never change
                    buffer.copy_(content)
        for module, training in self._modes:
            module.training = training
        self._random.replay()


class _Hessian:
    """The second derivative of a loss, as a product with vectors over all trainable parameters."""

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        self._parameters = parameters
        self._curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
        self._gradients = gradients

    def __matmul__(self, vector: list[Tensor]) -> list[Tensor]:
        if not self._curved:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        return _owned(
            torch.autograd.grad(
                [self._gradients[i] for i in self._curved],
                self._parameters,
                [vector[i] for i in self._curved],
                retain_graph=True,
                materialize_grads=True,
            )
        )


def _worst_increase(
    surface: _Surface, start: float, gradients: list[Tensor], ball: LMO, rho: float, steps: int, seed: int
) -> float:
    """Conditional-gradient ascent from ε = 0: go to, or if that is no increase, towards the LMO's answer."""
    chosen = [i for i, parameter in enumerate(surface.parameters) if ball.selects(parameter)]
    if not chosen:
        return 0.0
    parameters = [surface.parameters[i] for i in chosen]
    states = [ball.init_state(parameter, seed + i) for i, parameter in enumerate(parameters)]
    inside = [torch.zeros_like(parameter, dtype=working_dtype(parameter)) for parameter in parameters]
    directions = [gradients[i] for i in chosen]
    if not any(bool(direction.any()) for direction in directions):
        directions = _random_like(parameters, seed)  # a critical point: no gradient says which way is up
    best, share = start, 1.0
    for _ in range(steps):
        corners = ball(_owned(directions), [rho] * len(chosen), states, seed)
        # A convex combination of points of the ball is in the ball.
        tried = [torch.lerp(e, _dense(corner).to(e), share) for e, corner in zip(inside, corners, strict=True)]
        epsilons: list[Tensor | None] = [None] * len(surface.parameters)
        for i, epsilon in zip(chosen, tried, strict=True):
            epsilons[i] = epsilon
        value, there = surface.displaced(epsilons)
        if value > best:
            best, inside, directions = value, tried, [there[i] for i in chosen]
            share = min(1.0, 2 * share)
        else:
            share /= 2
    return best - start


def _top_eigenvalue(surface: _Surface, iterations: int, seed: int) -> float:
    """The Rayleigh quotient of the power iteration's last unit vector."""
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that has a second derivative
        H = surface.hessian()
        v = _unit(_random_like(surface.parameters, seed))
        for _ in range(iterations):
            Hv = H @ v
            eigenvalue = _inner(v, Hv)
            if not math.isfinite(eigenvalue):
                return math.nan
            v = _unit(Hv)
    return eigenvalue


def _unit(vector: list[Tensor]) -> list[Tensor]:
    """The vector over its ℓ2 norm, in place; zero stays zero."""
    answers = L2()(vector, [1.0] * len(vector), [{} for _ in vector], 0)
    return [_dense(answer) for answer in answers]


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    dtypes = [working_dtype(x) for x in a]
    return sum(
        float(torch.dot(x.flatten().to(dtype), y.flatten().to(dtype))) for x, y, dtype in zip(a, b, dtypes, strict=True)
    )


def _dense(perturbation: Perturbation) -> Tensor:
    if isinstance(perturbation, Dense):
        return perturbation.epsilon
    return torch.outer(perturbation.u, perturbation.v)


def _owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that may be overwritten, which autograd's answers (shared, expanded) may not."""
    return [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _random_like(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """Normal entries, drawn on the CPU so that they are the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype) for x in tensors]


def _checked_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the network itself.")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model must be a bare module, got one wrapped by DistributedDataParallel; pass model.module.")
    for parameter in model.parameters():
        if is_sharded(parameter):
            raise NotImplementedError(
                f"model must be whole on one device, got a sharded parameter of shape {tuple(parameter.shape)}; "
                "measure an unsharded copy."
            )
    return model
