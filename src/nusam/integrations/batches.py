"""The batch of a training step as it was before a pass had it."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from nusam.batch import rebuilt

__all__ = ["Kept"]


class Kept:
    """A batch as it was before a pass had it."""

    def __init__(self, batch: Any, clones: bool) -> None:
        self.has_graph = False
        self.objects: list[object] = []  # whose attributes are looked after as those of owners are
        self._clones = clones
        self._versions: list[tuple[Tensor, int]] = []
        self._batch = self._own(batch, {}, self._look_at)

    @property
    def changed(self) -> bool:
        """Whether a tensor was written into."""
        return any(tensor._version != version for tensor, version in self._versions)

    def again(self) -> Any:
        """The batch, in containers and tensors that are this pass's own."""
        return self._own(self._batch, {}, lambda tensor: None)

    def _look_at(self, tensor: Tensor) -> None:
        self.has_graph |= tensor.grad_fn is not None
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))

    def _own(self, part: Any, made: dict[int, Tensor], look_at: Callable[[Tensor], None]) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in made:  # one that is there twice stays one
                look_at(part)
                made[id(part)] = self._own_tensor(part)
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
