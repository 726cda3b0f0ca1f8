"""The batch of a training step as it was before a pass had it."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from nusam.batch import rebuilt
from nusam.guards.batch_copies import Entries

__all__ = ["Kept"]


class Kept:
    """A batch as it was before a pass had it."""

    def __init__(self, batch: Any, clones: bool) -> None:
        self.has_graph = False
        self.objects: list[object] = []  # whose attributes are looked after as those of owners are
        self._clones = clones
        self.entries: list[Entries] = []  # of what the first pass gets
        self._batch = self._own(batch, {}, self._look_at)

    def again(self, entries: list[Entries] | None = None) -> Any:
        """The batch, in containers and tensors that are this pass's own; ``entries`` gets those of its tensors."""

        def look_at(tensor: Tensor, own: Tensor) -> None:
            if entries is not None and not own.is_inference():
                entries.append(Entries(own, tensor if self._clones else None))

        return self._own(self._batch, {}, look_at)

    def _look_at(self, tensor: Tensor, own: Tensor) -> None:
        self.has_graph |= tensor.grad_fn is not None
        if not tensor.is_inference():
            self.entries.append(Entries(tensor, own if self._clones else None))

    def _own(self, part: Any, made: dict[int, Tensor], look_at: Callable[[Tensor, Tensor], None]) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in made:  # one that is there twice stays one
                made[id(part)] = self._own_tensor(part)
                look_at(part, made[id(part)])
            return made[id(part)]
        try:
            fresh = rebuilt(part, partial(self._own, made=made, look_at=look_at))
        except TypeError:  # it can't be copied apart
            fresh = None
        if fresh is not None:
            return fresh
        if hasattr(type(part), "__copy__"):
            return copy.copy(part)
        if hasattr(part, "__dict__") and not callable(part):
            self.objects.append(part)
        return part

    def _own_tensor(self, tensor: Tensor) -> Tensor:
        if self._clones:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        # a gradient of the inputs stays with the pass that took it
        return tensor.detach().requires_grad_(tensor.requires_grad) if type(tensor) is Tensor else tensor
