"""From the gradient to what a ball maximizes against, and from the ball's ε to the one that is added.

A new direction is one small class: subclass :class:`Direction`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nusam.lmo import Dense, Epsilon, State, measured
from nusam.norms import largest_entry
from nusam.power_iteration import ALONE, Together

__all__ = ["Adaptive", "Averaged", "Direction", "Friendly", "RowNoise", "Sparse"]


class Direction:
    """The gradient itself, and the ball's ε as it is.

    Every method gets lists with an entry for each perturbed parameter: what is here of it, if it is sharded. States are
    written in place.
    """

    needs_gradient = True  # of the ascent; without it a step has one pass
    sees_shards = True  # whether it can work on the part of a parameter that a process holds
    sees_zeros = False  # whether a gradient of zeros, which one that is not there counts as, is more than nothing to it
    sees_scale = False  # whether it mixes gradients of several steps, which a loss scaler may have scaled differently

    def init_state(self, parameter: Tensor) -> State:
        """What is remembered for ``parameter`` from step to step (saved and resumed by name)."""
        return {}

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        """What the ball maximizes against, which the ball may overwrite.

        Gradients that are infinite or NaN must come out so, and leave no trace in the states: the step has no ε then.
        """
        return list(gradients)

    def shaped(
        self,
        epsilons: list[Epsilon],
        parameters: Sequence[Tensor],
        states: Sequence[State],
        together: Together = ALONE,
    ) -> list[Epsilon]:
        """ε as it is added."""
        return epsilons


class Averaged(Direction):
    """VaSSO (Li & Giannakis 2024): d ← (1−θ)d + θg, from d = 0."""

    sees_zeros = True
    sees_scale = True

    def __init__(self, theta: float) -> None:
        self.theta = theta

    def init_state(self, parameter: Tensor) -> State:
        return {"d": torch.zeros_like(parameter, requires_grad=False)}

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        alive = _are_finite(gradients)
        found = []
        for state, g in zip(states, gradients, strict=True):
            d, here = state["d"], alive.to(g.device)
            d.lerp_(torch.where(here, g, d), self.theta)
            found.append(torch.where(here, d, g))
        return found


class Friendly(Direction):
    """Friendly SAM (Li et al. 2024): d = g − σm, then m ← λm + (1−λ)g; in the first step d = m = g."""

    sees_zeros = True
    sees_scale = True

    def __init__(self, sigma: float, lmbda: float) -> None:
        self.sigma, self.lmbda = sigma, lmbda

    def init_state(self, parameter: Tensor) -> State:
        return {
            "m": torch.zeros_like(parameter, requires_grad=False),
            "begun": torch.zeros((), device=parameter.device),  # 1 from the second step on, on the device
        }

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        alive = _are_finite(gradients)
        found = []
        for state, g in zip(states, gradients, strict=True):
            begun, m, here = state["begun"] > 0, state["m"], alive.to(g.device)
            found.append(torch.where(begun, g - self.sigma * m, g))
            m.copy_(torch.where(here, torch.where(begun, torch.lerp(g, m, self.lmbda), g), m))
            state["begun"].copy_(begun | here)
        return found


class Adaptive(Direction):
    """ASAM (Kwon et al. 2021): ε = ρT²g/‖Tg‖ with T = |w| + η for matrices and kernels, 1 for biases and norms."""

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        return [self._scaled(g, w) for g, w in zip(gradients, parameters, strict=True)]

    def shaped(
        self,
        epsilons: list[Epsilon],
        parameters: Sequence[Tensor],
        states: Sequence[State],
        together: Together = ALONE,
    ) -> list[Epsilon]:
        return measured([self._scaled(_entries(e), w) for e, w in zip(epsilons, parameters, strict=True)], together)

    def _scaled(self, x: Tensor, w: Tensor) -> Tensor:
        return x * (w.abs() + self.eta) if w.ndim >= 2 else x


class Sparse(Direction):
    """SSAM (Mi et al. 2022): ε on the entries with the largest g², as many as are left of all; a mask for many steps.

    The norm is taken before the mask, so that ‖ε‖ ≤ ρ.
    """

    sees_shards = False
    sees_zeros = True

    def __init__(self, sparsity: float, refresh: int) -> None:
        self.sparsity, self.refresh = sparsity, int(refresh)

    def init_state(self, parameter: Tensor) -> State:
        return {
            "mask": torch.ones_like(parameter, dtype=torch.bool, requires_grad=False),
            "masked": torch.zeros((), dtype=torch.bool, device="cpu"),
        }

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        if step % self.refresh == 0 or not all(state["masked"] for state in states):
            self._choose(gradients, states)
        return list(gradients)

    def _choose(self, gradients: Sequence[Tensor], states: Sequence[State]) -> None:
        """By |g|, which has the order of g² and no other range than g; gradients that are not finite choose nothing."""
        sizes = torch.cat([g.abs().flatten().to(gradients[0].device) for g in gradients])
        count = math.ceil((1 - self.sparsity) * sizes.numel() * (1 - 1e-12))  # (1 − 0.7) · 10 is a little more than 3
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[sizes.topk(count).indices] = True
        masks = torch.split(kept, [g.numel() for g in gradients])
        alive = sizes.isfinite().all()
        for state, g, mask in zip(states, gradients, masks, strict=True):
            before = state["mask"]
            before.copy_(torch.where(alive, mask.view(g.shape), before.to(mask.device)))
            state["masked"].fill_(True)

    def shaped(
        self,
        epsilons: list[Epsilon],
        parameters: Sequence[Tensor],
        states: Sequence[State],
        together: Together = ALONE,
    ) -> list[Epsilon]:
        return measured([_entries(e) * s["mask"] for e, s in zip(epsilons, states, strict=True)], together)


class RowNoise(Direction):
    """RWP (Li et al. 2024): Gaussian noise, of every row (filter) as large as the row itself is."""

    needs_gradient = False
    sees_shards = False

    def of(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], states: Sequence[State], step: int, seed: int
    ) -> list[Tensor]:
        found = []
        for index, w in enumerate(parameters):
            generator = torch.Generator(w.device).manual_seed(seed + index)
            noise = torch.empty_like(w, requires_grad=False).normal_(generator=generator)
            rows = tuple(range(1, w.ndim)) if w.ndim > 1 else tuple(range(w.ndim))
            found.append(noise * torch.linalg.vector_norm(w, dim=rows, keepdim=True) if w.numel() else noise)
        return found


def _are_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether all entries are, of what is here, without waiting for the device."""
    each = [largest_entry(g).isfinite() for g in gradients]
    return torch.stack([one.to(each[0].device) for one in each]).all()


def _entries(epsilon: Epsilon) -> Tensor:
    return epsilon.epsilon if isinstance(epsilon, Dense) else torch.outer(epsilon.u, epsilon.v)
