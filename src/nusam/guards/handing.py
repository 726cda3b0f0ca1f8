"""A batch that a user's code is given several times in one step, each time as it was before."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nusam.containers import DEEP, rebuilt
from nusam.guards.batch_copies import BatchCopies, Entries
from nusam.guards.taking_back import can_be_looked_into, slots_of

__all__ = ["Handing", "copied", "in_own_containers"]


class Handing:
    """Hands batches to code that may take entries out of them, bind others, or write into their tensors.

    Containers are made anew for every call. Tensors are copied as :class:`BatchCopies` has it.

    Args:
        whose: what users call the code.
    """

    def __init__(self, whose: str) -> None:
        self._copies = BatchCopies(whose)

    @contextmanager
    def out(self, batch: Any) -> Iterator[Any]:
        """What one call is given, inside.

        Raises:
            Written: if it wrote into a tensor where no copy had been made.
        """
        given: dict[int, tuple[Tensor, Tensor]] = {}  # of every tensor: itself, and what the call gets
        fresh = self._fresh(batch, given)
        entries = [
            Entries(handed, tensor if self._copies.are_made else None)
            for tensor, handed in given.values()
            if not handed.is_inference()
        ]
        yield fresh
        self._copies.note(entries)

    def learn(self) -> None:
        """A step is over."""
        self._copies.step_is_over()

    def _fresh(self, batch: Any, given: dict[int, tuple[Tensor, Tensor]]) -> Any:
        def tensor_of(tensor: Tensor) -> Tensor:
            if id(tensor) not in given:  # one that is there twice stays one
                given[id(tensor)] = tensor, copied(tensor) if self._copies.are_made else _again(tensor)
            return given[id(tensor)][1]

        return in_own_containers(batch, tensor_of)


def in_own_containers(batch: Any, tensor_of: Callable[[Tensor], Tensor]) -> Any:
    """A batch in containers and objects of its own, with what is to be had of each tensor; arrays are copied."""
    objects: dict[int, Any] = {}  # one that is there twice, or holds itself, stays one

    def own(part: Any, deep: int) -> Any:
        if isinstance(part, Tensor):
            return tensor_of(part)
        if type(part) in (list, tuple) and (not part or isinstance(part[0], int | float | str)):
            return part[:]  # labels or tokens, perhaps many
        if id(part) in objects:
            return objects[id(part)]
        try:
            fresh = rebuilt(part, lambda entry: own(entry, deep))
        except (AttributeError, RuntimeError, TypeError):  # it can't be written
            return part
        if fresh is not None:
            return fresh
        if hasattr(type(part), "__copy__"):
            return copy.copy(part)
        return own_object(part, deep) if deep and can_be_looked_into(part) else part

    def own_object(part: Any, deep: int) -> Any:
        attributes = {**slots_of(part), **getattr(part, "__dict__", {})}
        try:
            fresh = copy.copy(part) if attributes else part
        except Exception:  # its class has the last word on that
            return part
        if fresh is not part:
            objects[id(part)] = fresh
            for name, value in attributes.items():
                object.__setattr__(fresh, name, own(value, deep - 1))
        return fresh

    return own(batch, DEEP)


def copied(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, for autograd the same tensor."""
    with torch.set_grad_enabled(tensor.requires_grad):
        return tensor.clone()


def _again(tensor: Tensor) -> Tensor:
    """The same numbers in the same memory, in whose place this tensor may be given another."""
    return tensor.detach() if type(tensor) is Tensor and not tensor.requires_grad else tensor
