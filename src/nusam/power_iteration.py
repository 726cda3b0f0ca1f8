"""Algorithm 2, the warm-started power iteration, on a list of matrices at once."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "ALONE",
    "TAU",
    "Explicit",
    "Matrix",
    "Together",
    "TopPair",
    "meeting",
    "normalized",
    "power_iteration",
    "products",
    "signs",
    "working_dtype",
]

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


class Together(Protocol):
    """How processes that hold parts of matrices add up what each computed from its own.

    The lists that it gets have an entry for every matrix, always in the same order.
    """

    def sum_(self, xs: list[Tensor], own_rows_suffice: bool = False) -> None:
        """Sum every x over the processes, in place.

        ``own_rows_suffice``: nothing but a process's own rows of the matrix will be multiplied with the sum.
        """

    def max_(self, xs: list[Tensor]) -> None:
        """The largest of every x over the processes, in place."""


class Alone:
    """Every matrix is here as a whole."""

    def sum_(self, xs: list[Tensor], own_rows_suffice: bool = False) -> None:
        pass

    def max_(self, xs: list[Tensor]) -> None:
        pass


ALONE: Together = Alone()


def power_iteration(
    matrices: Sequence[Matrix | Tensor], us: Sequence[Tensor], iterations: int = 1, together: Together = ALONE
) -> list[TopPair]:
    """``iterations`` rounds of v = Aᵀu/‖Aᵀu‖, u = Av/‖Av‖ for each A (n×m) and its warm start u (n).

    Three deviations from Algorithm 2 as printed, so that a warm start never dies and the result does not
    depend on the scale of A: vectors are normalised relative to their own largest entry before τ is
    added; a zero, infinite or NaN matrix returns its warm start unchanged with ``alive = False``; and where
    A is not zero but Aᵀu is, v starts from A itself, see :func:`meeting`.
    Tensors are multiplied in their warm start's dtype. Nothing here waits for the device.
    """
    return normalized(*products(matrices, meeting(us), iterations, together), us) if matrices else []


def meeting(us: Sequence[Tensor]) -> list[Tensor]:
    """Warm starts u (n) that every matrix meets.

    A gradient of few rows, such as that of a table of which a sample looks up a part, can miss every row that u lives
    on. So each u gets random signs of a size that its own entries round away: where Aᵀu is not zero nothing
    changes, and where it is the iteration starts anew from Aᵀ(signs).
    """
    if not us:
        return []
    return list(torch._foreach_add(list(us), [_small_signs(u.numel(), u.device, u.dtype) for u in us]))


@lru_cache(maxsize=256)
def signs(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random signs, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(n)
    signs = torch.randint(0, 2, (n,), generator=generator, device="cpu", dtype=torch.int8)
    return signs.to(device, dtype).mul_(2).sub_(1)


@lru_cache(maxsize=256)
def _small_signs(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    small: Tensor = signs(n, device, dtype) * (torch.finfo(dtype).eps ** 2 * n**-0.5)
    return small


def products(
    matrices: Sequence[Matrix | Tensor], us: Sequence[Tensor], iterations: int, together: Together = ALONE
) -> tuple[list[Tensor], list[Tensor]]:
    """The last Av and v of every A, v with a largest entry of one: all of the iteration but its norms.

    Norms in between would change nothing but rounding; scaling keeps products within the dtype's range.
    """
    operators = [Explicit(A.to(u.dtype)) if isinstance(A, Tensor) else A for A, u in zip(matrices, us, strict=True)]
    current = list(us)
    for left in reversed(range(iterations)):
        vs = [A.rmatvec(u) for A, u in zip(operators, current, strict=True)]
        together.sum_(vs)
        largest = torch._foreach_norm(vs, float("inf"))
        torch._foreach_div_(vs, largest)
        current = [A.matvec(v) for A, v in zip(operators, vs, strict=True)]
        together.sum_(current, own_rows_suffice=left > 0)
        if left:
            torch._foreach_div_(current, largest)
    return current, vs


def normalized(us: Sequence[Tensor], vs: Sequence[Tensor], warm_starts: Sequence[Tensor]) -> list[TopPair]:
    """The triples of :func:`products`' vectors, which are overwritten."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, u in enumerate(us):
        kinds.setdefault((u.device, u.dtype), []).append(i)
    pairs: list[TopPair] = [None] * len(us)  # type: ignore[list-item]
    for indices in kinds.values():
        chosen = ([xs[i] for i in indices] for xs in (us, vs, warm_starts))
        for i, pair in zip(indices, _normalized(*chosen), strict=True):
            pairs[i] = pair
    return pairs


def _normalized(us: list[Tensor], vs: list[Tensor], warm_starts: list[Tensor]) -> list[TopPair]:
    """The same for vectors of one device and dtype, all of which go through each operation together."""
    u_norms, u_largest = _normalize(us)
    v_norms, v_largest = _normalize(vs)
    sigmas = u_norms / v_norms * (u_largest / v_largest)
    alive = sigmas.isfinite()  # 0/0, inf/inf and NaN all end up as a NaN norm
    sigmas = sigmas.masked_fill(~alive, 0)
    for v, dead in zip(vs, (~alive).unbind(), strict=True):
        v.masked_fill_(dead, 0)
    us = [torch.where(*chosen) for chosen in zip(alive.unbind(), us, warm_starts, strict=True)]
    return [TopPair(*pair) for pair in zip(us, vs, sigmas.unbind(), alive.unbind(), strict=True)]


def _normalize(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x/(‖x‖ + τ) for every x in place, free of under- and overflow; the norms in two factors."""
    largest = torch._foreach_norm(xs, float("inf"))
    torch._foreach_div_(xs, largest)
    norms = torch._foreach_norm(xs)
    torch._foreach_div_(xs, torch._foreach_add(norms, TAU))
    return torch.stack(norms), torch.stack(largest)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with ``tensor`` are computed: its own, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
