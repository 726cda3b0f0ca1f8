"""Which parameters the wrappers in a model hold, and whose processes share each of them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from nusam.distributed.blocks import groups_of
from nusam.distributed.sums import Group

__all__ = ["Holding"]


class Managed(NamedTuple):
    """What FSDP2 knows of a parameter."""

    mesh: Any  # over which it splits the batch
    parameter: Any  # FSDP2's own notes
    divisor: float | None  # of the sum over processes, if it is not their number


class Holding:
    """What DistributedDataParallel reduces and FSDP2 shards; a parameter beside them is each process's own.

    Args:
        ddps: the wrappers of the one.
        fsdp: the modules of the other.
    """

    def __init__(self, ddps: Sequence[Any], fsdp: Sequence[Any]) -> None:
        self._ddps = ddps
        self._fsdp = fsdp

    def holds(self, parameter: Tensor) -> bool:
        """Whether any wrapper does."""
        return parameter in self.managed or any(id(parameter) in reduced for _, reduced in self._reduced)

    def is_own(self, parameter: Tensor) -> bool:
        """Whether none does, though they hold others over several processes."""
        return not self.holds(parameter) and any(group.size() > 1 for group in self.groups)

    def groups_of(self, parameter: Tensor) -> tuple[Group, ...]:
        """Whose processes each compute a summand of the parameter's gradient; none if nobody adds them up."""
        if parameter in self.managed:
            return groups_of(self.managed[parameter].mesh)
        return tuple(group for group, reduced in self._reduced if id(parameter) in reduced)

    def divisor_of(self, parameter: Tensor) -> float | None:
        """What the sum of the summands is divided by, if not by their number."""
        return self.managed[parameter].divisor if parameter in self.managed else None

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Over which anything is shared, each once."""
        meshes = dict.fromkeys(group.mesh_info.mesh for group in self.fsdp_groups())
        found = [*(ddp.process_group for ddp in self._ddps), *(group for mesh in meshes for group in groups_of(mesh))]
        return tuple(dict.fromkeys(found))

    @cached_property
    def _reduced(self) -> list[tuple[Group, set[int]]]:
        """Of each DistributedDataParallel its group, and the ids of what it reduces."""
        return [(ddp.process_group, _reduced_by(ddp)) for ddp in self._ddps]

    @cached_property
    def managed(self) -> dict[Tensor, Managed]:
        """The parameters that FSDP2 shards."""
        return {
            p.sharded_param: Managed(group.mesh_info.mesh, p, getattr(group, "gradient_divide_factor", None))
            for group in self.fsdp_groups()
            for p in group.fsdp_params
        }

    @cached_property
    def stored(self) -> dict[Tensor, Tensor]:
        """What is sharded, of what FSDP2 gathered."""
        gathered = {getattr(known.parameter, "_unsharded_param", None): p for p, known in self.managed.items()}
        return {parameter: sharded for parameter, sharded in gathered.items() if parameter is not None}

    def fsdp_groups(self) -> Iterator[Any]:
        """FSDP2's groups of parameters, as it gathers and reduces them."""
        for module in self._fsdp:
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            groups = [state._fsdp_param_group] if several is None else several
            yield from (group for group in groups if group is not None)


_ids: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def _reduced_by(ddp: Any) -> set[int]:
    """The ids of what a DistributedDataParallel reduces, which it keeps; others in its module it was told to ignore."""
    known = _ids.get(ddp)
    if known is None:
        known = _ids[ddp] = set(map(id, [*ddp._module_parameters, *ddp._delay_all_reduce_params]))
    return known
