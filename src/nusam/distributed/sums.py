"""Sums over processes: those of all matrices travel in one flat buffer."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "Ranks", "Route"]


Group = Any  # torch.distributed.ProcessGroup, which a build without torch.distributed does not have


class Route(NamedTuple):
    """Over which processes the vectors of one matrix are summed."""

    groups: tuple[Group, ...] = ()  # one after the other
    counted: bool = True  # False where another process holds the same and speaks for both
    own_rows: bool = False  # whether each process multiplies by its own rows of u alone


class Ranks:
    """Sums over processes, of as many tensors as there are routes, in one collective for each set of groups."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    def sum_(self, xs: list[Tensor], own_rows_suffice: bool = False) -> None:
        wanted = [i for i, route in enumerate(self._routes) if not (own_rows_suffice and route.own_rows)]
        for i in wanted:
            if not self._routes[i].counted:
                xs[i] = torch.zeros_like(xs[i])
        self._reduce(xs, wanted, dist.ReduceOp.SUM)

    def max_(self, xs: list[Tensor]) -> None:
        self._reduce(xs, range(len(xs)), dist.ReduceOp.MAX)

    def _reduce(self, xs: list[Tensor], wanted: Iterable[int], operation: Any) -> None:
        batches: dict[tuple[Any, ...], list[int]] = {}
        for i in wanted:
            if self._routes[i].groups:
                batches.setdefault((self._routes[i].groups, xs[i].dtype, xs[i].device), []).append(i)
        for (groups, _, _), indices in batches.items():
            flat = torch.cat([xs[i].reshape(-1) for i in indices])
            device = flat.device
            for group in groups:
                flat = _where_it_talks(flat, group)
                dist.all_reduce(flat, operation, group)
            flat = flat.to(device)
            pieces = torch.split(flat, [xs[i].numel() for i in indices])
            for i, piece in zip(indices, pieces, strict=True):
                xs[i] = piece.view(xs[i].shape)


def _where_it_talks(flat: Tensor, group: Group) -> Tensor:
    """On a device that the group can reduce on: offloaded gradients lie on the CPU, where NCCL does not."""
    kinds = [device.type for device in getattr(group, "_device_types", [flat.device])]
    return flat if flat.device.type in kinds else flat.to(kinds[0])
