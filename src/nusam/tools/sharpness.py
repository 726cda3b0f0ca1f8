"""How sharp the loss is around a model's weights: the worst increase in two norm balls, and the Hessian."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from nusam.ascent.serving import full_precision
from nusam.distributed.blocks import is_sharded
from nusam.guards.checks import check_count, check_radius
from nusam.guards.model_guard import RandomState
from nusam.interrupts import always
from nusam.lmo import L2, LMO, Dense, Epsilon, Nuclear
from nusam.power_iteration import working_dtype
from nusam.tools.arguments import check_gradients_can_be_had, check_network, check_takes
from nusam.tools.derivatives import Gradients, Hessian, owned

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
    evaluated in the mode it is in, and under whatever autocast it is called; batch norm in training mode uses the
    batch's statistics, and dropout draws the same masks every time. Costs ``steps`` forward and backward passes for
    each ball, ``hessian_iterations`` double backward passes, and memory for about four copies of the weights.

    Weights below float32 round most of a small ε away; measure a float32 copy of such a model.

    Args:
        model: the bare module, neither compiled (unless ``hessian_iterations=0``) nor wrapped or sharded.
        loss: gets the model and returns the loss of always the same batch, a 0-d tensor.
        rho: radius of both balls.
        steps: ascent steps in each ball, at least 1.
        hessian_iterations: Hessian-vector products of the power iteration; 0 leaves the Hessian out, for models
            with an operation that has no second derivative, or re-entrant checkpoints.
        seed: of the start vectors, at least 0.

    Raises:
        TypeError: if the model is no bare module, or the loss is not callable or returns no tensor.
        ValueError: if a number is out of range, nothing is trainable, or the loss is not 0-d or has no gradient.
        NotImplementedError: if a parameter is sharded or complex, or the loss has no second derivative that torch
            can give, and ``hessian_iterations`` is not 0.
        RuntimeError: under ``torch.inference_mode()``.
    """
    check_radius(rho)
    check_count("steps", steps, 1)
    check_count("hessian_iterations", hessian_iterations)
    check_count("seed", seed)
    surface = _Surface(_checked_model(model), loss)
    with torch.enable_grad(), always(surface.restore):
        value, gradients = surface.begin()
        if hessian_iterations and surface.gradients.are_nested:
            raise NotImplementedError(
                "The loss runs another backward inside its backward, as a re-entrant checkpoint does, of which there "
                "is no second derivative; use use_reentrant=False, or leave the Hessian out with hessian_iterations=0."
            )
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
        check_takes("loss", loss, "the model")
        self.model = model
        self.loss = loss
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("The model has no trainable parameter to displace; set requires_grad on some.")
        self.gradients = Gradients(self.parameters)
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

    def hessian(self) -> Hessian:
        """The Hessian at the weights as they are."""
        self._move([None] * len(self.parameters))
        return Hessian(self.parameters, self.evaluate())

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

    def _move(self, epsilons: list[Tensor | None]) -> None:
        with torch.no_grad():
            for parameter, start, epsilon in zip(self.parameters, self._starts, epsilons, strict=True):
                parameter.copy_(start if epsilon is None else start + epsilon)
        torch.clear_autocast_cache()  # an autocast around it all would go on with its copy of the weights

    def _rewind(self) -> None:
        with torch.no_grad():
            for owner, name, buffer, content in self._buffers:
                setattr(owner, name, buffer)
                if not torch.equal(buffer, content):  # expanded buffers can't be written, and never change
                    buffer.copy_(content)
        for module, training in self._modes:
            module.training = training
        self._random.replay()


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
        with full_precision(parameters):
            corners = ball(owned(directions), [rho] * len(chosen), states, seed)
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


def _dense(perturbation: Epsilon) -> Tensor:
    if isinstance(perturbation, Dense):
        return perturbation.epsilon
    return torch.outer(perturbation.u, perturbation.v)


def _random_like(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """Normal entries, drawn on the CPU so that they are the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype) for x in tensors]


def _checked_model(model: Any) -> nn.Module:
    check_network(model)
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model must be a bare module, got one wrapped by DistributedDataParallel; pass model.module.")
    for parameter in model.parameters():
        if is_sharded(parameter):
            raise NotImplementedError(
                f"model must be whole on one device, got a sharded parameter of shape {tuple(parameter.shape)}; "
                "measure an unsharded copy."
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise NotImplementedError(
                f"model must have real weights, got a {parameter.dtype} one of shape {tuple(parameter.shape)}; measure "
                "one that holds its real and imaginary parts, or freeze it."
            )
    check_gradients_can_be_had(model, "sharpness()")
    assert isinstance(model, nn.Module)
    return model
