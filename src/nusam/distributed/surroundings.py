"""What stands around the parameters: wrappers of torch's that hold them, whether or not anybody handed those over.

A wrapper knows its module, a module does not know its wrapper: so wrappers are looked for among the objects of this
process, once.
"""

import gc
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nusam.distributed.holding import Holding

__all__ = ["Holders", "has_replicas"]


def has_replicas(model: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` copies the model or a part of it in every forward.

    The copies share what is set on the modules' instances, and have other weights than those.
    """
    inside = (module for module in model.modules() if isinstance(module, nn.DataParallel))
    if any(len(wrapper.device_ids) > 1 for wrapper in inside):
        return True
    if torch.accelerator.device_count() < 2:
        return False
    parameters = set(model.parameters())
    around = [wrapper for wrapper in _objects((nn.DataParallel,)) if len(wrapper.device_ids) > 1]
    return any(not parameters.isdisjoint(wrapper.parameters()) for wrapper in around)


class Holders:
    """The objects of this process that hold some of the parameters, looked for when they are first asked for."""

    def __init__(self) -> None:
        self._asked: tuple[object, ...] = ()
        self._found: list[weakref.ref[Any]] = []
        self._flat: tuple[nn.Module | None, bool] = (None, False)
        self._engine: bool | None = None

    def forget(self) -> None:
        """Look again when they are next asked for."""
        self.__init__()  # type: ignore[misc]

    def of(self, parameters: Sequence[Tensor], stages: bool, replicas: bool) -> list[Any]:
        """Those that are still there.

        Args:
            parameters: what they may hold.
            stages: whether to look for stages of a pipeline.
            replicas: whether to look for DistributedDataParallel.
        """
        stage = _imported("torch.distributed.pipelining.stage", "_PipelineStageBase")
        kinds = ((stage,) if stages and stage else ()) + ((DistributedDataParallel,) if replicas else ())
        if not kinds:
            return []
        if self._asked != kinds:
            wanted = set(parameters)
            found = [x for x in _objects(kinds) if not wanted.isdisjoint(getattr(x, "submod", x).parameters())]
            self._found, self._asked = [weakref.ref(x) for x in found], kinds
        return [x for x in (ref() for ref in self._found) if x is not None]

    def replicated(self, parameters: Sequence[Tensor]) -> Holding:
        """What is reduced by DistributedDataParallel, whether or not it was named as the model."""
        around = self.of(parameters, stages=True, replicas=True)
        return Holding([x for x in around if isinstance(x, DistributedDataParallel)], [])

    def engine(self, parameters: Sequence[Tensor], optimizer: object = None) -> bool:
        """Whether DeepSpeed's engine holds some of the parameters, or steps by this optimizer."""
        kind = _imported("deepspeed.runtime.engine", "DeepSpeedEngine")
        if kind is None:
            return False
        if self._engine is None:
            wanted = set(parameters)
            engines = [(engine.module.parameters(), engine.basic_optimizer) for engine in _objects((kind,))]
            self._engine = any(
                not wanted.isdisjoint(held) or (steps is not None and steps is optimizer) for held, steps in engines
            )
        return self._engine

    def flatten(self, parameters: Sequence[Tensor], model: nn.Module | None) -> bool:
        """Whether FullyShardedDataParallel (FSDP1) keeps some parameter, or wraps a part of the model."""
        if any(getattr(parameter, "_fsdp_flattened", False) is True for parameter in parameters):
            return True
        kind = _imported("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
        if model is None or kind is None:
            return False
        if self._flat[0] is not model:
            self._flat = (model, any(isinstance(module, kind) for module in model.modules()))
        return self._flat[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(Holders())


def _imported(module: str, name: str) -> type | None:
    """A class of torch's if anybody has imported it, which may take longer than all of us."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _objects(kinds: tuple[type, ...]) -> list[Any]:
    """All objects of these classes; asks nothing of others, which may be proxies of who knows what."""
    is_one: dict[type, bool] = {}
    found = []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in is_one:
            is_one[kind] = any(wanted in kind.__mro__ for wanted in kinds)
        if is_one[kind]:
            found.append(thing)
    return found
