"""The batch of a loop's passes, which every pass finds as the first one found it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nusam.containers import DEEP, PLAIN, entries_of, is_list, is_list_of_plain
from nusam.guards.batch_copies import BatchCopies, Entries
from nusam.guards.taking_back import can_be_looked_into, is_a_writable_container, is_an_array, refill, slots_of, undo_of

__all__ = ["Rewinding"]


class Rewinding:
    """Takes back what a pass did to its batch: what it took out or bound anew, and what it wrote.

    Tensors are copied as :class:`BatchCopies` has it; arrays of numpy always.
    """

    def __init__(self) -> None:
        self._copies = BatchCopies("The loop over passes()")
        self._forget()

    def _forget(self) -> None:
        self._looked = False
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._tensors: list[_Known] = []

    @torch.no_grad()
    def keep(self, batch: Any) -> None:
        """The first pass begins.

        Raises:
            TypeError: if the batch holds an iterator, which would give the next pass something else.
        """
        self._forget()
        self._keep(batch, DEEP)

    @torch.no_grad()
    def rewind(self) -> None:
        """Another pass begins, after one that is over.

        Raises:
            Written: if the pass before wrote into a tensor of which there is no copy.
        """
        self._looked = True
        for known in self._tensors:
            is_written = self._copies.note([known.entries])  # which raises if there is no copy
            known.put_back()
            if is_written:
                known.entries.write_back()
        for undo in self._undo:
            undo()

    def end(self) -> None:
        """There are no more passes."""
        if self._looked:
            self._copies.step_is_over()
        self._forget()

    def _keep(self, part: Any, deep: int) -> None:
        """Remember what a part of the batch holds, and what its attributes hold, ``deep`` of these one in another."""
        if id(part) in self._seen:
            return
        self._seen[id(part)] = part
        if isinstance(part, Tensor):
            self._keep_tensor(part, deep)
            return
        if isinstance(part, PLAIN):
            return
        if type(part) is tuple:
            pass
        elif is_a_writable_container(part):
            self._undo.append(partial(refill, part, dict(part) if isinstance(part, Mapping) else list(part)))
        elif isinstance(part, Iterator) and deep == DEEP:
            raise TypeError(
                f"passes() was given a {type(part).__name__}, an iterator, which would give the descent other samples "
                "than the ascent; hand over a list of what it gives."
            )
        else:
            undo = undo_of(part)
            self._undo += [undo] if undo else []
        if not (is_list(part) and is_list_of_plain(part)):  # tokens, perhaps many
            for entry in _entries_of(part):
                self._keep(entry, deep)
        if deep and type(part) not in (tuple, list, dict) and can_be_looked_into(part):
            slots = slots_of(part)
            self._undo += [partial(_rebind, part, slots)] if slots else []
            for inside in (*slots.values(), getattr(part, "__dict__", None)):
                self._keep(inside, deep - 1)

    def _keep_tensor(self, tensor: Tensor, deep: int) -> None:
        if tensor.is_inference():
            return
        known = _Known(tensor, self._copies.are_made)
        self._tensors.append(known)
        for inside in (known.grad, *known.attributes.values()):
            self._keep(inside, deep)


class _Known:
    """A tensor as it was: where its entries lie, what they are if a copy was made, its attributes, and its gradient.

    Args:
        tensor: of the batch.
        copied: whether to copy its entries.
    """

    def __init__(self, tensor: Tensor, copied: bool) -> None:
        self._tensor = tensor
        self._is_leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad
        self.attributes = dict(vars(tensor))
        self.grad = tensor.grad if self._is_leaf else None
        self.entries = Entries(tensor, tensor.clone() if copied else None)

    def put_back(self) -> None:
        """All but its entries."""
        tensor = self._tensor
        if self._is_leaf and not (tensor.is_leaf or tensor._is_view()):  # something with a graph was written into it
            tensor.detach_()
        if self._is_leaf and tensor.is_leaf:
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        self.entries.put_back()
        if vars(tensor) or self.attributes:
            refill(vars(tensor), self.attributes)


def _entries_of(part: Any) -> Iterable[Any]:
    """What a container holds, or an array of objects."""
    if isinstance(part, set | frozenset | deque):
        return part
    return part.flat if is_an_array(part) and part.dtype.hasobject else entries_of(part)


def _rebind(thing: Any, before: dict[str, Any]) -> None:
    """Give an object the attributes that it had in slots."""
    now = slots_of(thing)
    for name in now.keys() - before.keys():
        object.__delattr__(thing, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            object.__setattr__(thing, name, value)
