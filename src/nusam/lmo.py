"""Norm balls: from the ascent gradient to the perturbation ε (§3, eq. (5)–(6), Appendix C.1).

Each class answers ``ε = argmax { ⟨ε, ∇f⟩ : ‖ε‖ ≤ ρ }`` for one norm. A new ball is one small class:
subclass :class:`LMO`, return a :class:`Dense` or a :class:`RankOne` for every gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from nusam.norms import are_alike, largest_entry, multiply_each, norm_of, unit
from nusam.power_iteration import ALONE, Matrix, Together, TopPair, power_iteration, working_dtype

__all__ = [
    "Dense",
    "Gaussian",
    "L2",
    "LMO",
    "Linf",
    "Nuclear",
    "NuclearNormalized",
    "Epsilon",
    "RankOne",
    "Spectral",
    "Unnormalized",
    "matrix_shape",
    "measured",
]


State = dict[str, Tensor]


class Dense(NamedTuple):
    """A perturbation with an entry for every weight."""

    epsilon: Tensor  # the parameter's shape
    norm: Tensor  # () Frobenius norm of ε


class RankOne(NamedTuple):
    """The perturbation u·vᵀ of a matrix, kept as its two vectors; of E stacked matrices, as E of each."""

    u: Tensor  # (n,) or (E, n), unit norm
    v: Tensor  # (m,) or (E, m), carries the radius
    sigma: Tensor  # () estimate of the gradient's top singular value, the largest of a stack
    norm: Tensor  # () Frobenius (of one matrix: nuclear) norm of ε


Epsilon = Dense | RankOne


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
    ) -> list[Epsilon]: ...


class Nuclear(LMO):
    """νSAM (Lemma 3.1): ε = ρ·u·vᵀ with the top singular pair of each matrix's gradient, independently.

    The ball is ``max_i ‖M_i‖_* ≤ ρ``. Only 2-D parameters are perturbed, unless told otherwise. ε costs n+m floats
    for an n×m matrix: the persistent warm start u (n), drawn from the seed, and v (m).

    Args:
        power_iterations: T of Algorithm 2, at least 1.
        convolutions: whether parameters of three to five dimensions (o, i, k, …) count as matrices (o, i·k·…), as
            the kernels of convolutions do.
    """

    sees_shards = True
    joint = False
    target = "2-D parameter"

    def __init__(self, power_iterations: int = 1, convolutions: bool = False) -> None:
        whole = isinstance(power_iterations, Integral) and not isinstance(power_iterations, bool)
        if not whole or power_iterations < 1:
            raise ValueError(f"power_iterations must be a whole number of at least 1, got {power_iterations!r}.")
        if not isinstance(convolutions, bool):
            raise ValueError(f"convolutions must be True or False, got {convolutions!r}.")
        self.power_iterations = int(power_iterations)
        self.convolutions = convolutions
        if convolutions:
            self.target = "2-D parameter or the kernel of a convolution"

    def selects(self, parameter: Tensor) -> bool:
        shape = unpacked_shape(parameter)
        return 2 <= len(shape) <= (5 if self.convolutions else 2) and shape.numel() > 0

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
    ) -> list[Epsilon]:
        pairs = power_iteration(gradients, [state["u"] for state in states], self.power_iterations, together)
        return self.from_pairs(pairs, radii, states)

    def from_pairs(self, pairs: Sequence[TopPair], radii: Sequence[float], states: Sequence[State]) -> list[Epsilon]:
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
        if are_alike(vs):
            alive = torch.stack([pair.alive for pair in pairs]).to(vs[0].dtype)
            multiply_each(vs, radii)
            if min(sizes) == max(sizes):
                norms = list(alive.mul_(sizes[0]).unbind())
            else:
                norms = list(alive.unbind())
                torch._foreach_mul_(norms, sizes)
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
        shares, _ = unit([together])
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
    ) -> list[Epsilon]:
        directions, norms = unit(gradients, together, radii)
        return [Dense(*pair) for pair in zip(directions, norms, strict=True)]


class Gaussian(LMO):
    """GaussSAM (Fig. 1's control): ε = ρ·e/‖e‖₂ with e ~ N(0, I), whatever the gradient.

    Not an LMO in the strict sense: it ignores the gradient's values, and costs as much as SAM.
    """

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Epsilon]:
        for index, gradient in enumerate(gradients):
            gradient.normal_(generator=torch.Generator(gradient.device).manual_seed(seed + index))
        return L2()(gradients, [abs(radius) for radius in radii], states, seed)


class Unnormalized(LMO):
    """USAM (Andriushchenko & Flammarion 2022): ε = ρ·∇f.

    Not an LMO in the strict sense: ε grows with the gradient, and so with the scale of a loss scaler.
    """

    sees_shards = True

    def __call__(
        self,
        gradients: Sequence[Tensor],
        radii: Sequence[float],
        states: Sequence[State],
        seed: int,
        together: Together = ALONE,
    ) -> list[Epsilon]:
        maxima = [largest_entry(G).float() for G in gradients]
        together.max_(maxima)
        dead = ~torch.stack([x.to(maxima[0].device) for x in maxima]).isfinite().all()
        epsilons = [(G * radius).masked_fill_(dead.to(G.device), 0) for G, radius in zip(gradients, radii, strict=True)]
        return measured(epsilons, together)


class Linf(LMO):
    """Entry-wise maximum norm: ε = ρ·sign(∇f). Shows how a ball is added."""

    joint = False

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Epsilon]:
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
    ) -> list[Epsilon]:
        epsilons = [self._polar(gradient).mul_(radius) for gradient, radius in zip(gradients, radii, strict=True)]
        return [Dense(epsilon, torch.linalg.vector_norm(epsilon)) for epsilon in epsilons]

    def _polar(self, G: Tensor) -> Tensor:
        dead = ~_is_alive(G)
        finite = G.to(working_dtype(G)).masked_fill(dead, 0)
        U, _, Vh = torch.linalg.svd(finite / _or_one(finite.abs().amax()), full_matrices=False)
        polar: Tensor = (U @ Vh).masked_fill_(dead, 0)
        return polar.to(G.dtype)


def unpacked_shape(parameter: Tensor) -> torch.Size:
    """The shape of what a parameter holds, which bitsandbytes packs, and DeepSpeed keeps elsewhere."""
    packed = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape
    return torch.Size(shape)


def measured(epsilons: list[Tensor], together: Together) -> list[Epsilon]:
    """Each with its norm, of which this process may know a part."""
    squares = [norm_of(epsilon).square() for epsilon in epsilons]
    together.sum_(squares)
    return [Dense(epsilon, square.sqrt()) for epsilon, square in zip(epsilons, squares, strict=True)]


def matrix_shape(parameter: Tensor) -> torch.Size:
    """(n, m) of the matrix that a parameter holds; a kernel (o, i, k, …) is one of (o, i·k·…)."""
    shape = unpacked_shape(parameter)
    return torch.Size((shape[0], shape[1:].numel())) if len(shape) > 2 else shape


def _is_alive(G: Tensor) -> Tensor:
    return G.isfinite().all() & (G != 0).any()


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
