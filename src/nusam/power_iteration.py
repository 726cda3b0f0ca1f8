"""Algorithm 2, the warm-started power iteration, on a list of matrices at once."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["TAU", "Matrix", "TopPair", "power_iteration", "working_dtype"]

TAU = 1e-12  # τ of Algorithm 2, here relative to the largest entry of the vector it regularises


class Matrix(Protocol):
    """What a power iteration needs of an n×m matrix A."""

    def matvec(self, v: Tensor) -> Tensor:
        """Av, of length n."""

    def rmatvec(self, u: Tensor) -> Tensor:
        """Aᵀu, of length m."""


class Explicit:
    """A matrix that is there."""

    def __init__(self, A: Tensor) -> None:
        self.A = A

    def matvec(self, v: Tensor) -> Tensor:
        return self.A @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.A.mT @ u


class TopPair(NamedTuple):
    """Estimate of a matrix's top singular triple, and whether it can be trusted."""

    u: Tensor  # (n,) unit norm, or the warm start where not alive
    v: Tensor  # (m,) unit norm, or zero where not alive
    sigma: Tensor  # () ‖Av‖, or zero where not alive
    alive: Tensor  # () bool: False where A is zero, or holds an inf or a NaN


def power_iteration(matrices: Sequence[Matrix | Tensor], us: Sequence[Tensor], iterations: int = 1) -> list[TopPair]:
    """``iterations`` rounds of v = Aᵀu/‖Aᵀu‖, u = Av/‖Av‖ for each A (n×m) and its warm start u (n).

    Two deviations from Algorithm 2 as printed, so that a warm start never dies and the result does not
    depend on the scale of A: vectors are normalised relative to their own largest entry before τ is
    added, and a zero, infinite or NaN matrix returns its warm start unchanged with ``alive = False``.
    Tensors are multiplied in their warm start's dtype. Nothing here waits for the device.
    """
    if not matrices:
        return []
    operators = [Explicit(A.to(u.dtype)) if isinstance(A, Tensor) else A for A, u in zip(matrices, us, strict=True)]
    current = list(us)
    for _ in range(iterations):
        vs, _ = _normalize([A.rmatvec(u) for A, u in zip(operators, current, strict=True)])
        current, norms = _normalize([A.matvec(v) for A, v in zip(operators, vs, strict=True)])
    sigmas = [norm * largest for norm, largest in zip(*norms, strict=True)]
    pairs = []
    for warm, u, v, sigma in zip(us, current, vs, sigmas, strict=True):
        alive = sigma.isfinite()  # 0/0, inf/inf and NaN all end up as a NaN norm
        v, sigma = v.masked_fill_(~alive, 0), sigma.masked_fill(~alive, 0)
        pairs.append(TopPair(torch.where(alive, u, warm), v, sigma, alive))
    return pairs


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with ``tensor`` are computed: its own, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _normalize(xs: list[Tensor]) -> tuple[list[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """x/(‖x‖ + τ) for every x, free of under- and overflow, and the norms in two factors."""
    largest = torch._foreach_norm(xs, float("inf"))
    torch._foreach_div_(xs, largest)
    norms = torch._foreach_norm(xs)
    torch._foreach_div_(xs, torch._foreach_add(norms, TAU))
    return xs, (norms, largest)
