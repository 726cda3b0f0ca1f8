"""Which part of a matrix is here: FSDP2 and tensor parallelism give each process a block of it."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nusam.distributed.sums import Group, Route
from nusam.power_iteration import Matrix

__all__ = [
    "Block",
    "BlockOf",
    "Layout",
    "groups_of",
    "averaged",
    "block",
    "complete",
    "compute_device",
    "is_cut_by_rows",
    "is_on_its_way",
    "is_sharded",
    "layout",
    "local",
    "local_state",
    "output_of_blocks",
    "route",
    "whole",
]


class Block(NamedTuple):
    """The part of a matrix (n×m) that this process holds, and how the parts are added up."""

    shape: torch.Size
    rows: slice
    columns: slice
    route: Route
    share: float = 1.0  # of the mean over processes, what is here


class BlockOf:
    """A matrix (n×m) whose other blocks are elsewhere: products are zero where those would add theirs."""

    def __init__(self, matrix: Matrix, block: Block) -> None:
        self.matrix, self.block = matrix, block

    def matvec(self, v: Tensor) -> Tensor:
        u = v.new_zeros(self.block.shape[0])
        u[self.block.rows] = self.matrix.matvec(v[self.block.columns])
        return u if self.block.share == 1 else u.mul_(self.block.share)

    def rmatvec(self, u: Tensor) -> Tensor:
        v = u.new_zeros(self.block.shape[1])
        v[self.block.columns] = self.matrix.rmatvec(u[self.block.rows])
        return v if self.block.share == 1 else v.mul_(self.block.share)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "device_mesh")


def is_on_its_way(tensor: Tensor) -> bool:
    """Whether a collective may still be sending the tensor, as the output of a layer that is split by columns."""
    return type(tensor).__name__ == "AsyncCollectiveTensor"


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of a state, sharing memory."""
    return {name: local(value) for name, value in state.items()}


def compute_device(parameter: Any) -> torch.device:
    """Where products with the parameter run; sharded parameters may be kept on the CPU in between."""
    if not is_sharded(parameter):
        return cast(torch.device, parameter.device)
    kind = parameter.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


@lru_cache(maxsize=256)
def whole(shape: torch.Size) -> Block:
    """A matrix that is here as a whole."""
    n, m = shape
    return Block(shape, slice(0, n), slice(0, m), Route())


def averaged(part: Block, groups: tuple[Group, ...]) -> Block:
    """A block of which every process of ``groups`` has another value, and whose mean over them is meant."""
    share = part.share / math.prod(group.size() for group in groups)
    return part._replace(route=Route((*part.route.groups, *groups)), share=share)


class Layout(NamedTuple):
    """How a tensor-parallel linear layer y = xWᵀ is split, by rows or by columns of W."""

    mesh: Any
    of_input_gradient: Any
    of_output: Any

    def gather_gradient(self, D: Any) -> Tensor:
        """Of the output's gradient, what the block here is multiplied with."""
        from torch.distributed.tensor import Replicate

        wanted = Replicate() if self.of_output.is_partial() else self.of_output
        return cast(Tensor, D.redistribute(self.mesh, [wanted]).to_local())


def layout(x: Any, W: Any) -> Layout | None:
    """The layout of a layer whose weight is a DTensor in its forward; None if it is no usual one."""
    from torch.distributed.tensor import Partial, Replicate, Shard  # late: it takes longer to import than all of us

    if W.device_mesh.ndim != 1 or not is_sharded(x) or x.device_mesh != W.device_mesh:
        return None
    last = Shard(x.ndim - 1)
    if W.placements == (Shard(0),) and x.placements == (Replicate(),):
        return Layout(W.device_mesh, Partial(), last)
    if W.placements == (Shard(1),) and x.placements == (last,):
        return Layout(W.device_mesh, last, Partial())
    return None


def output_of_blocks(x: Any, W: Any, y: Tensor, of_block: Callable[[Tensor, Block], Tensor]) -> Tensor:
    """A linear layer's output, laid out as its own ``y``, from the output of the block of W that each process holds.

    Raises:
        RuntimeError: if the layer is not split the usual ways.
    """
    from torch.distributed.tensor import DTensor

    split = layout(x, W)
    if split is None:
        raise RuntimeError(
            f"A layer of shape {tuple(W.shape)} is split as {W.placements}, its input as "
            f"{getattr(x, 'placements', 'no DTensor')}; an ε in the forward needs ColwiseParallel or RowwiseParallel, "
            "or use placement='weights'."
        )
    part = of_block(x.to_local(grad_placements=[split.of_input_gradient]), block(W))
    return DTensor.from_local(part, split.mesh, [split.of_output], run_check=False, shape=y.shape, stride=y.stride())


def block(tensor: Any) -> Block:
    """Which block of a matrix is here, of a 2-D parameter or gradient, or of a kernel (o, i, k, …) as (o, i·k·…)."""
    n, m = tensor.shape[0], tensor.shape[1:].numel()
    shape = torch.Size((n, m))
    if not is_sharded(tensor):
        return whole(shape)
    rows, columns, *others = _slices(tensor)
    if others:
        columns = slice(0, m)  # kernels are cut by rows alone, see is_cut_by_rows
    return Block(shape, rows, columns, route(tensor))


def is_cut_by_rows(tensor: Any) -> bool:
    """Whether every process holds whole rows of a sharded parameter, of any shape."""
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in tensor.placements)


def route(tensor: Any) -> Route:
    """How sums over the entries of a parameter or gradient of any shape are completed."""
    if not is_sharded(tensor) or all(placement.is_replicate() for placement in tensor.placements):
        return Route()
    mesh, placements = tensor.device_mesh, tensor.placements
    speaks = all(mesh.get_local_rank(i) == 0 for i, placement in enumerate(placements) if placement.is_replicate())
    return Route(groups_of(mesh), speaks, own_rows=is_cut_by_rows(tensor))


def complete(gradient: Any, parameter: Any) -> Tensor:
    """The gradient, laid out as its parameter: tensor parallelism may leave summands, or all of it to every process.

    Zeros if there is none.
    """
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if is_sharded(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return cast(Tensor, gradient)


def _slices(tensor: Any) -> list[slice]:
    """Of each dimension, what is here: every mesh dimension that shards it cuts what the others left.

    FSDP2 cuts last what tensor parallelism cut before, though its mesh dimension comes first, and says so by a
    placement of its own ("strided").
    """
    mesh = tensor.device_mesh
    here = [(0, size) for size in tensor.shape]
    cuts = [(i, p) for i, p in enumerate(tensor.placements) if not p.is_replicate() and not p.is_partial()]
    for i, placement in sorted(cuts, key=lambda cut: "Strided" in type(cut[1]).__name__):
        start, stop = here[placement.dim]
        size = -(-(stop - start) // mesh.size(i))
        first = min(start + mesh.get_local_rank(i) * size, stop)
        here[placement.dim] = (first, min(first + size, stop))
    return [slice(*bounds) for bounds in here]


def groups_of(mesh: Any) -> tuple[Group, ...]:
    """What spans the mesh: one group if there is one, else one for each dimension."""
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        return (dist.group.WORLD,)
    return tuple(mesh.get_group(i) for i in range(mesh.ndim))
