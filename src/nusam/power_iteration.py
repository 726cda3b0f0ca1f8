"""Algorithm 2, the warm-started power iteration, on a list of matrices at once."""

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

__all__ = [
    "ALONE",
    "TAU",
    "Explicit",
    "Matrix",
    "Together",
    "TopPair",
    "as_matrix",
    "irregular",
    "iterated",
    "meeting",
    "normalized",
    "power_iteration",
    "power_iteration_of_stack",
    "products",
    "times",
    "top_pairs",
    "working_dtype",
]

SMALL = 2**15  # entries of a matrix up to which it is multiplied in one call with others of its shape
TAU = 1e-12  # τ of Algorithm 2, here relative to the largest entry of the vector it regularises


class Matrix(Protocol):
    """What a power iteration needs of an n×m matrix A."""

    def matvec(self, v: Tensor) -> Tensor:
        """Av, of length n."""

    def rmatvec(self, u: Tensor) -> Tensor:
        """Aᵀu, of length m."""


def as_matrix(A: Tensor) -> Tensor:
    """The same entries as a matrix, row by row in whatever order they lie in memory."""
    return A if A.ndim == 2 else A.flatten(1)


def times(A: Tensor, x: Tensor) -> Tensor:
    """Ax; of stacks, whose x (k, m, 1) are columns, by their rows: batched products with columns are slow."""
    return A @ x if A.ndim == 2 else (x.mT @ A.mT).mT


class Explicit:
    """A matrix that is there; with u (k, n, 1) and v (k, m, 1), k of them (k, n, m)."""

    def __init__(self, A: Tensor) -> None:
        self.A = A

    def kind(self) -> Hashable:
        """What small matrices that can be stacked have in common."""
        A = self.A
        return (A.shape, A.dtype, A.device) if A.numel() <= SMALL else None

    @staticmethod
    def stacked(matrices: "Sequence[Explicit]") -> "Explicit":
        return Explicit(torch.stack([matrix.A for matrix in matrices]))

    def matvec(self, v: Tensor) -> Tensor:
        return times(self.A, v)

    def rmatvec(self, u: Tensor) -> Tensor:
        return times(self.A.mT, u)


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
    A is zero in all rows that u lives on, v starts from A itself, see :func:`meeting`.
    Tensors are multiplied in their warm start's dtype; those of more dimensions are kernels (o, i, k, …), matrices of
    (o, i·k·…). Nothing here waits for the device.
    """
    return top_pairs(matrices, meeting(us), us, iterations, together)


def top_pairs(
    matrices: Sequence[Matrix | Tensor],
    us: Sequence[Tensor],
    warm_starts: Sequence[Tensor],
    iterations: int,
    together: Together = ALONE,
) -> list[TopPair]:
    """:func:`power_iteration` from u that the matrices meet, for which a dead matrix gets its warm start back."""
    pairs: list[TopPair] = [None] * len(matrices)  # type: ignore[list-item]
    for indices, Avs, vs in _in_stacks(matrices, us, iterations, together):
        own = [warm_starts[i] for i in indices]
        if isinstance(Avs, Tensor):
            found = _rows(*_normalized(Avs, cast(Tensor, vs), torch.stack(own)))
        else:
            found = normalized(Avs, cast(list[Tensor], vs), own)
        for i, pair in zip(indices, found, strict=True):
            pairs[i] = pair
    return pairs


def power_iteration_of_stack(A: Tensor, us: Sequence[Tensor], iterations: int = 1) -> list[TopPair]:
    """The same for k matrices that are there as one tensor (k, n, m)."""
    own = torch.stack(list(us))
    met = own + _small(own.shape[1], own.device, own.dtype)
    (Avs,), (vs,) = iterated([Explicit(A)], [met[..., None]], iterations, ALONE)
    return _rows(*_normalized(Avs[..., 0], vs[..., 0], own))


def meeting(us: Sequence[Tensor]) -> list[Tensor]:
    """Warm starts u (n) that every matrix meets.

    A gradient of few rows, such as that of a table of which a sample looks up a part, can miss every row that u lives
    on. So each u gets random numbers r of a size that its own entries round away: where A has a row that u lives on
    nothing changes, and where it has none the iteration starts anew from Aᵀr. Rows of A may be each other's negatives,
    as those of a pair that is told apart, so no two entries of r are of one size.
    """
    if not us:
        return []
    return list(torch._foreach_add(list(us), [_small(u.numel(), u.device, u.dtype) for u in us]))


@lru_cache(maxsize=256)
def irregular(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random vector, the same in every process, whose sum over no regular set of its entries is 0."""
    generator = torch.Generator("cpu").manual_seed(n)
    return torch.randn(n, generator=generator, device="cpu", dtype=torch.float64).to(device, dtype)


@lru_cache(maxsize=256)
def _small(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    small: Tensor = irregular(n, device, dtype) * (torch.finfo(dtype).eps ** 2 * n**-0.5)
    return small


def products(
    matrices: Sequence[Matrix | Tensor], us: Sequence[Tensor], iterations: int, together: Together = ALONE
) -> tuple[list[Tensor], list[Tensor]]:
    """The last Av and v of every A, v with a largest entry of one: all of the iteration but its norms."""
    found: list[tuple[Tensor, Tensor]] = [None] * len(matrices)  # type: ignore[list-item]
    for indices, Avs, vs in _in_stacks(matrices, us, iterations, together):
        for i, pair in zip(indices, zip(Avs, vs, strict=True), strict=True):
            found[i] = pair
    return [Av for Av, _ in found], [v for _, v in found]


def _in_stacks(
    matrices: Sequence[Matrix | Tensor], us: Sequence[Tensor], iterations: int, together: Together
) -> Iterator[tuple[list[int], Tensor | list[Tensor], Tensor | list[Tensor]]]:
    """Which matrices, and their Av and v: rows of a tensor where small ones of a kind were multiplied in one call."""
    operators = [
        Explicit(as_matrix(A).to(u.dtype)) if isinstance(A, Tensor) else A for A, u in zip(matrices, us, strict=True)
    ]
    if together is not ALONE or len(operators) == 1:
        yield list(range(len(operators))), *iterated(operators, list(us), iterations, together)
        return
    kinds: dict[Hashable, list[int]] = {}
    for i, operator in enumerate(operators):
        kind = operator.kind() if hasattr(operator, "kind") else None
        kinds.setdefault(None if kind is None else (type(operator), kind, us[i].dtype), []).append(i)
    for kind, indices in kinds.items():
        alike, own = [operators[i] for i in indices], [us[i] for i in indices]
        if kind is None or len(indices) == 1:
            yield indices, *iterated(alike, own, iterations, together)
        else:
            stack: Any = type(alike[0])
            (Avs,), (vs,) = iterated([stack.stacked(alike)], [torch.stack(own)[..., None]], iterations, together)
            yield indices, Avs[..., 0], vs[..., 0]


def iterated(
    operators: Sequence[Matrix], us: list[Tensor], iterations: int, together: Together
) -> tuple[list[Tensor], list[Tensor]]:
    """The same for matrices as they are, each by itself: u (n), or for stacks (k, n, 1).

    Norms in between would change nothing but rounding; scaling keeps products within the dtype's range.
    """
    current = us
    for left in reversed(range(iterations)):
        vs = [A.rmatvec(u) for A, u in zip(operators, current, strict=True)]
        together.sum_(vs)
        if vs[0].ndim == 1:
            largest = list(torch._foreach_norm(vs, float("inf")))
        else:
            largest = [torch.linalg.vector_norm(v, float("inf"), dim=-2, keepdim=True) for v in vs]
        torch._foreach_div_(vs, largest)
        current = [A.matvec(v) for A, v in zip(operators, vs, strict=True)]
        together.sum_(current, own_rows_suffice=left > 0)
        if left:
            torch._foreach_div_(current, largest)
    return current, vs


def normalized(us: Sequence[Tensor], vs: Sequence[Tensor], warm_starts: Sequence[Tensor]) -> list[TopPair]:
    """The triples of :func:`products`' vectors."""
    kinds: dict[Hashable, list[int]] = {}
    for i, (u, v) in enumerate(zip(us, vs, strict=True)):
        kinds.setdefault((u.shape, v.shape, u.device, u.dtype), []).append(i)
    pairs: list[TopPair] = [None] * len(us)  # type: ignore[list-item]
    for alike in kinds.values():
        first = alike[0]
        at_once = max(1, SMALL // (us[first].numel() + vs[first].numel()))  # they are copied
        for start in range(0, len(alike), at_once):
            indices = alike[start : start + at_once]
            chosen = (torch.stack([xs[i] for i in indices]) for xs in (us, vs, warm_starts))
            for i, pair in zip(indices, _rows(*_normalized(*chosen)), strict=True):
                pairs[i] = pair
    return pairs


def _rows(*stacks: Tensor) -> list[TopPair]:
    return [TopPair(*pair) for pair in zip(*(stack.unbind() for stack in stacks), strict=True)]


def _normalized(us: Tensor, vs: Tensor, warm_starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for k vectors of one shape: u (k, n), v (k, m), σ and whether they are alive (k).

    Of v the largest entry is one, or it is dead.
    """
    largest = torch.linalg.vector_norm(us, float("inf"), dim=-1, keepdim=True)
    us.div_(largest)  # free of under- and overflow, as v is already
    u_norms, v_norms = (torch.linalg.vector_norm(xs, dim=-1, keepdim=True) for xs in (us, vs))
    sigmas = u_norms / v_norms * largest
    alive = sigmas < float("inf")  # 0/0, inf/inf and NaN all end up as a NaN norm
    dead = ~alive
    us = torch.where(alive, us.div_(u_norms + TAU), warm_starts)
    vs.div_(v_norms + TAU).masked_fill_(dead, 0)
    return us, vs, sigmas.masked_fill_(dead, 0)[:, 0], alive[:, 0]


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with ``tensor`` are computed: its own, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
