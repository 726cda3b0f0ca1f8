"""Norm balls: from the ascent gradient to the perturbation ε (§3, eq. (5)–(6), Appendix C.1).

Each class answers ``ε = argmax { ⟨ε, ∇f⟩ : ‖ε‖ ≤ ρ }`` for one norm. A new ball is one small class:
subclass :class:`LMO`, return a :class:`Dense` or a :class:`RankOne` for every gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nusam.power_iteration import ALONE, Matrix, Together, TopPair, power_iteration, working_dtype

__all__ = [
    "Dense",
    "Gaussian",
    "L2",
    "LMO",
    "Linf",
    "Nuclear",
    "NuclearNormalized",
    "Perturbation",
    "RankOne",
    "Spectral",
    "matrix_shape",
]

State = dict[str, Tensor]


class Dense(NamedTuple):
    """A perturbation with an entry for every weight."""

    epsilon: Tensor  # the parameter's shape
    norm: Tensor  # () Frobenius norm of ε


class RankOne(NamedTuple):
    """The perturbation u·vᵀ of a matrix, kept as its two vectors."""

    u: Tensor  # (n,) unit norm
    v: Tensor  # (m,) carries the radius
    sigma: Tensor  # () estimate of the gradient's top singular value
    norm: Tensor  # () Frobenius (= nuclear) norm of ε


Perturbation = Dense | RankOne


class LMO(ABC):
    """A norm ball's linear maximization oracle.

    ``__call__`` gets the ascent gradients of the chosen parameters, a radius and a persistent state for
    each, and a seed that is new in every step. A radius is negative where the base optimizer maximizes, and ε is then
    that of the negative gradient. It may overwrite the gradients. What it returns must not
    depend on their common scale (a loss scaler multiplies them), and must be 0 where a gradient is zero,
    infinite or NaN. It should not wait for the device.

    A ball with ``sees_shards`` also gets ``together``, and gradients of which each process may hold a part
    (FSDP2, tensor parallelism): it must complete every sum or maximum over entries with it.
    """

    sees_shards = False
    joint = True  # whether the parameters share one radius, so that all of them must be seen together
    target = "parameter"  # what it perturbs, in the words of an error message

    def selects(self, parameter: Tensor) -> bool:
        """Whether this ball perturbs ``parameter`` at all."""
        return True

    def numel(self, parameter: Tensor) -> int:
        """Floats that ε of ``parameter`` needs."""
        return parameter.numel()

    def init_state(self, parameter: Tensor, seed: int) -> State:
        """What is remembered for ``parameter`` from step to step (saved and resumed by name)."""
        return {}

    @abstractmethod
    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Perturbation]: ...


class Nuclear(LMO):
    """νSAM (Lemma 3.1): ε = ρ·u·vᵀ with the top singular pair of each matrix's gradient, independently.

    The ball is ``max_i ‖M_i‖_* ≤ ρ``. Only 2-D parameters are perturbed. ε costs n+m floats for an n×m
    matrix: the persistent warm start u (n), drawn from the seed, and v (m).

    Args:
        power_iterations: T of Algorithm 2, at least 1.
    """

    sees_shards = True
    joint = False
    target = "2-D parameter"

    def __init__(self, power_iterations: int = 1) -> None:
        if not isinstance(power_iterations, int) or isinstance(power_iterations, bool) or power_iterations < 1:
            raise ValueError(f"power_iterations must be a whole number of at least 1, got {power_iterations!r}.")
        self.power_iterations = power_iterations

    def selects(self, parameter: Tensor) -> bool:
        shape = matrix_shape(parameter)
        return len(shape) == 2 and shape.numel() > 0

    def numel(self, parameter: Tensor) -> int:
        return sum(matrix_shape(parameter))

    def init_state(self, parameter: Tensor, seed: int) -> State:
        # Drawn on the CPU so that the start is the same on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        u = torch.randn(matrix_shape(parameter)[0], generator=generator, dtype=torch.float64, device="cpu")
        u /= torch.linalg.vector_norm(u)
        return {"u": u.to(parameter.device, working_dtype(parameter))}

    def __call__(
        self,
        gradients: Sequence[Tensor | Matrix],
        radii: Sequence[float],
        states: Sequence[State],
        seed: int,
        together: Together = ALONE,
    ) -> list[Perturbation]:
        pairs = power_iteration(gradients, [state["u"] for state in states], self.power_iterations, together)
        return self.from_pairs(pairs, radii, states)

    def from_pairs(
        self, pairs: Sequence[TopPair], radii: Sequence[float], states: Sequence[State]
    ) -> list[Perturbation]:
        """ε from top pairs that are known already, however they were found."""
        if not pairs:
            return []
        us = [torch.empty_like(pair.u) for pair in pairs]
        torch._foreach_copy_(us, [pair.u for pair in pairs])  # each is a row of many, which shall not stay for its sake
        for state, u in zip(states, us, strict=True):
            state["u"] = u
        vs = [pair.v for pair in pairs]
        shares = self._shares([pair.sigma for pair in pairs])
        sizes = [abs(radius) for radius in radii]
        if _are_alike(vs):
            norms = list(torch.stack([pair.alive for pair in pairs]).to(vs[0].dtype).unbind())
            _multiply(vs, radii)
            _multiply(norms, sizes)
        else:
            norms = [pair.alive.to(pair.sigma.dtype) for pair in pairs]
            torch._foreach_mul_(vs, list(radii))
            torch._foreach_mul_(norms, sizes)
        if shares is not None:
            torch._foreach_mul_(vs, shares)
            torch._foreach_mul_(norms, shares)
        return [RankOne(u, pair.v, pair.sigma, norm) for u, pair, norm in zip(us, pairs, norms, strict=True)]

    def _shares(self, sigmas: list[Tensor]) -> list[Tensor] | None:
        """What each matrix gets of its radius; None is all of it."""
        return None


class NuclearNormalized(Nuclear):
    """νSAM-Norm (Appendix C.1, eq. (21)): ε_i = ρ·σ_i·u_i·v_iᵀ / √Σσ_j².

    The ball is ``√Σ‖M_i‖_*² ≤ ρ``: the layers share one radius.
    """

    joint = True

    def _shares(self, sigmas: list[Tensor]) -> list[Tensor] | None:
        together = torch.stack([sigma.to(sigmas[0]) for sigma in sigmas])
        shares, _ = _unit([together])
        return [share.to(sigma) for share, sigma in zip(shares[0], sigmas, strict=True)]


class L2(LMO):
    """SAM (Foret et al.): ε = ρ·∇f/‖∇f‖₂ with one norm over all perturbed parameters."""

    sees_shards = True

    def __call__(
        self,
        gradients: Sequence[Tensor],
        radii: Sequence[float],
        states: Sequence[State],
        seed: int,
        together: Together = ALONE,
    ) -> list[Perturbation]:
        directions, norms = _unit(gradients, together, radii)
        return [Dense(*pair) for pair in zip(directions, norms, strict=True)]


class Gaussian(LMO):
    """GaussSAM (Fig. 1's control): ε = ρ·e/‖e‖₂ with e ~ N(0, I), whatever the gradient.

    Not an LMO in the strict sense: it ignores the gradient's values, and costs as much as SAM.
    """

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Perturbation]:
        for index, gradient in enumerate(gradients):
            gradient.normal_(generator=torch.Generator(gradient.device).manual_seed(seed + index))
        return L2()(gradients, [abs(radius) for radius in radii], states, seed)


class Linf(LMO):
    """Entry-wise maximum norm: ε = ρ·sign(∇f). Shows how a ball is added."""

    joint = False

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Perturbation]:
        epsilons = [
            G.sign().mul_(radius).masked_fill_(~_is_alive(G), 0) for G, radius in zip(gradients, radii, strict=True)
        ]
        return [Dense(epsilon, torch.linalg.vector_norm(epsilon)) for epsilon in epsilons]


class Spectral(LMO):
    """Spectral norm of each matrix: ε = ρ·UVᵀ from the gradient's SVD. 2-D parameters only.

    Shows how a ball is added; a full SVD per matrix makes it slow, and it waits for the device.
    """

    joint = False
    target = "2-D parameter"

    def selects(self, parameter: Tensor) -> bool:
        return parameter.ndim == 2 and parameter.numel() > 0

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Perturbation]:
        epsilons = [self._polar(gradient).mul_(radius) for gradient, radius in zip(gradients, radii, strict=True)]
        return [Dense(epsilon, torch.linalg.vector_norm(epsilon)) for epsilon in epsilons]

    def _polar(self, G: Tensor) -> Tensor:
        dead = ~_is_alive(G)
        finite = G.to(working_dtype(G)).masked_fill(dead, 0)
        U, _, Vh = torch.linalg.svd(finite / _or_one(finite.abs().amax()), full_matrices=False)
        polar: Tensor = (U @ Vh).masked_fill_(dead, 0)
        return polar.to(G.dtype)


def matrix_shape(parameter: Tensor) -> torch.Size:
    """(n, m) of the matrix that a parameter holds, which bitsandbytes packs two entries to a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.shape if packed is None else torch.Size(packed.shape)


def _unit(
    tensors: Sequence[Tensor], together: Together = ALONE, radii: Sequence[float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors divided in place by their joint ℓ2 norm, times a radius each, and the norm of each result.

    All zero where that norm is zero or not finite. Scaled by the largest entry first, so that the squares
    neither under- nor overflow.
    """
    tensors, radii = list(tensors), [1.0] * len(tensors) if radii is None else list(radii)
    if not _are_alike(tensors) or not all(x.numel() for x in tensors):
        return _unit_of_many_kinds(tensors, together, radii)
    maxima = list(torch._foreach_norm(tensors, float("inf")))
    together.max_(maxima)
    torch._foreach_div_(tensors, torch.stack(maxima).amax())
    norms = torch.stack(list(torch._foreach_norm(tensors, 2, dtype=working_dtype(tensors[0]))))
    if together is not ALONE:
        squares = list(norms.square().unbind())
        together.sum_(squares)
        norms = torch.stack(squares).sqrt()
    total = torch.linalg.vector_norm(norms)  # NaN where the largest entry is zero, infinite or NaN
    dead = ~total.isfinite()
    torch._foreach_div_(tensors, total.to(tensors[0].dtype))
    _multiply(tensors, radii)
    if dead.device.type != "cpu" or dead.item():  # elsewhere the host would have to wait
        for x in tensors:
            x.masked_fill_(dead, 0)
    shares = list((norms / total).masked_fill_(dead, 0).unbind())
    _multiply(shares, [abs(radius) for radius in radii])
    return tensors, shares


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    return len({(x.device, x.dtype) for x in tensors}) == 1


def _multiply(tensors: list[Tensor], factors: Sequence[float]) -> None:
    """Each of these, of one kind, in place with its own factor; one tensor is faster than a list of numbers."""
    if min(factors) == max(factors):
        torch._foreach_mul_(tensors, tensors[0].new_full((), factors[0]))
    else:
        torch._foreach_mul_(tensors, list(factors))


def _unit_of_many_kinds(
    tensors: list[Tensor], together: Together, radii: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`_unit` of tensors on several devices, of several dtypes, or some of them empty."""
    device, dtype = tensors[0].device, working_dtype(tensors[0])

    def joint(norms: Sequence[Tensor]) -> Tensor:
        return torch.stack([norm.to(device, dtype) for norm in norms])

    maxima = [_largest_entry(x) for x in tensors]
    together.max_(maxima)
    largest = joint(maxima).amax()
    scaled = [x.div_(largest.to(x.device)) for x in tensors]
    squares = [torch.linalg.vector_norm(x, dtype=working_dtype(x)).square() for x in scaled]
    together.sum_(squares)
    norms = joint(squares).sqrt()
    total = torch.linalg.vector_norm(norms)
    dead = ~(total.isfinite() & (largest > 0))
    for x, radius in zip(scaled, radii, strict=True):
        x.div_(total.to(x.device)).mul_(radius).masked_fill_(dead.to(x.device), 0)
    shares = (norms / total).masked_fill_(dead, 0)
    return scaled, [share.to(x.device) * abs(radius) for share, x, radius in zip(shares, scaled, radii, strict=True)]


def _largest_entry(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf")) if x.numel() else x.new_zeros(())


def _is_alive(G: Tensor) -> Tensor:
    return G.isfinite().all() & (G != 0).any()


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
