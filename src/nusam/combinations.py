"""What the descent does with both gradients: g at the weights, ĝ at the perturbed ones.

A new combination is one small class: subclass :class:`Combination`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nusam.lmo import State
from nusam.power_iteration import ALONE, Together, working_dtype

__all__ = ["Combination", "LookBack", "SurrogateGap", "Weighted"]


class Combination:
    """The base optimizer's gradient from both.

    Every method gets lists with an entry for each parameter that has both gradients: what is here of them, if the
    parameter is sharded. What ``together`` completes are sums over processes. States are written in place.
    """

    def init_state(self, parameter: Tensor) -> State:
        """What is remembered for ``parameter`` from step to step (saved and resumed by name)."""
        return {}

    def needs_ascent(self, age: int) -> bool:
        """Whether the step that is the ``age``-th since the delay is perturbed at all."""
        return True

    def of(
        self, clean: Sequence[Tensor], perturbed: Sequence[Tensor], states: Sequence[State], together: Together = ALONE
    ) -> list[Tensor]:
        """From g and ĝ."""
        return list(perturbed)

    def alone(self, clean: Sequence[Tensor], states: Sequence[State], together: Together = ALONE) -> list[Tensor]:
        """From g alone, in a step without an ascent."""
        return list(clean)


class Weighted(Combination):
    """(1−w)g + wĝ: WSAM (Yue et al. 2023) with w = γ/(1−γ), the mixture of RWP (Li et al. 2024) with w = λ."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def of(
        self, clean: Sequence[Tensor], perturbed: Sequence[Tensor], states: Sequence[State], together: Together = ALONE
    ) -> list[Tensor]:
        # lerp would take its other, less exact form beyond 1/2
        return [g + self.weight * (g_hat - g) for g, g_hat in zip(clean, perturbed, strict=True)]


class SurrogateGap(Combination):
    """GSAM (Zhuang et al. 2022): ĝ − αg⊥, with g⊥ = g − (⟨g,ĝ⟩/‖ĝ‖²)ĝ of all parameters together."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def of(
        self, clean: Sequence[Tensor], perturbed: Sequence[Tensor], states: Sequence[State], together: Together = ALONE
    ) -> list[Tensor]:
        along = _ratio(_dot(clean, perturbed, together), _dot(perturbed, perturbed, together))
        return [
            g_hat - self.alpha * (g - along.to(g.device, g.dtype) * g_hat)
            for g, g_hat in zip(clean, perturbed, strict=True)
        ]


class LookBack(Combination):
    """LookSAM (Liu et al. 2022): every k-th step SAM, and v = ĝ − ⟨ĝ,u⟩u, u = g/‖g‖, is kept; else g + α(‖g‖/‖v‖)v."""

    def __init__(self, every: int, alpha: float) -> None:
        self.every, self.alpha = int(every), alpha

    def init_state(self, parameter: Tensor) -> State:
        return {"v": torch.zeros_like(parameter, requires_grad=False)}

    def needs_ascent(self, age: int) -> bool:
        return age % self.every == 0

    def of(
        self, clean: Sequence[Tensor], perturbed: Sequence[Tensor], states: Sequence[State], together: Together = ALONE
    ) -> list[Tensor]:
        along = _ratio(_dot(perturbed, clean, together), _dot(clean, clean, together))
        for state, g, g_hat in zip(states, clean, perturbed, strict=True):
            v = g_hat - along.to(g.device, g.dtype) * g
            state["v"].copy_(v.nan_to_num(0, 0, 0))  # of a step that a scaler will skip
        return list(perturbed)

    def alone(self, clean: Sequence[Tensor], states: Sequence[State], together: Together = ALONE) -> list[Tensor]:
        vs = [state["v"] for state in states]
        size = self.alpha * _ratio(_dot(clean, clean, together), _dot(vs, vs, together)).sqrt()
        return [g + size.to(g.device, g.dtype) * v for g, v in zip(clean, vs, strict=True)]


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor], together: Together) -> Tensor:
    """⟨x, y⟩ over all parameters and processes."""
    parts = [(x.to(working_dtype(x)) * y).sum() for x, y in zip(xs, ys, strict=True)]
    together.sum_(parts)
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where there is nothing to divide by."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
