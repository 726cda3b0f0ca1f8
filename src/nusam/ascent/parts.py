"""What is here of a matrix's gradient after a pass: formed, or held by its layers, a block of it or a summand."""

from collections.abc import Sequence

from torch import Tensor

from nusam.ascent.products import Sum
from nusam.ascent.record import Record
from nusam.distributed.blocks import BlockOf, block, is_sharded, local, whole
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Route
from nusam.lmo import matrix_shape
from nusam.power_iteration import Explicit, Matrix, as_matrix, working_dtype

__all__ = ["by_gradient", "by_layers", "part_of", "shared_part"]


def part_of(parameter: Tensor, record: Record | None, trusted: bool) -> Tensor | Matrix | None:
    """The gradient of a parameter that is here as a whole, in whatever form; None if the pass did not reach it.

    Args:
        parameter: whose gradient it is.
        record: what its layers have, if they were asked.
        trusted: whether that counts where the gradient was formed only to be compared with it.
    """
    if record is None:
        return parameter.grad
    gradient = record.gradient
    if record.job.checks:
        return Sum(record.kept) if trusted and record.kept else gradient
    parts = list(record.kept)
    if record.formed is not None:
        parts.append(Explicit(as_matrix(record.formed).to(record.u.dtype)))
    if not parts:
        return gradient
    if gradient is not None:
        parts.append(Explicit(as_matrix(gradient).to(record.u.dtype)))
    return parts[0] if len(parts) == 1 else Sum(parts)


def shared_part(
    parameter: Tensor, record: Record | None, trusted: bool, workers: DataParallel, in_summands: bool
) -> tuple[Matrix, Route]:
    """What this process adds to a gradient that several have blocks or summands of, and how it is added up."""
    layers = by_layers(parameter, record, workers, in_summands) if record and record.kept else None
    formed = parameter.grad if record is None else record.gradient
    gradient = by_gradient(parameter, formed, workers, in_summands)
    if record is not None and record.job.checks:
        layers, gradient = (layers, None) if trusted and layers else (None, gradient)
    if layers is not None and gradient is not None:
        if not gradient[1].counted:
            return layers
        return Sum([layers[0], gradient[0]]), layers[1]
    if layers is not None or gradient is not None:
        return layers or gradient  # type: ignore[return-value]
    here = workers.block(parameter, in_layer=in_summands)
    here = workers.averaged(here, parameter) if in_summands else here
    return BlockOf(Nothing(here.rows, here.columns, here.shape), here), here.route


def by_layers(parameter: Tensor, record: Record, workers: DataParallel, in_summands: bool) -> tuple[Matrix, Route]:
    """The part that the layers have kept."""
    here = workers.averaged(record.block, parameter) if in_summands else record.block
    return BlockOf(Sum(record.kept), here), here.route


def by_gradient(
    parameter: Tensor, gradient: Tensor | None, workers: DataParallel, in_summands: bool
) -> tuple[Matrix, Route] | None:
    """The part that autograd has formed."""
    if gradient is None:
        return None
    matrix = Explicit(as_matrix(local(gradient)).to(working_dtype(gradient)))
    if is_sharded(gradient):  # averaged already
        here = block(gradient)
    else:
        here = whole(matrix_shape(parameter))
        here = workers.averaged(here, parameter) if in_summands else here
    return BlockOf(matrix, here), here.route


class Nothing:
    """A block of zeros, where a process has nothing to add."""

    def __init__(self, rows: slice, columns: slice, shape: Sequence[int]) -> None:
        self.n, self.m = (len(range(*cut.indices(size))) for cut, size in zip((rows, columns), shape, strict=True))

    def matvec(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.n)

    def rmatvec(self, u: Tensor) -> Tensor:
        return u.new_zeros(self.m)
