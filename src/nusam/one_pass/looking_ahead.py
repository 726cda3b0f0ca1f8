"""An iterator that can tell what comes next."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nusam.guards.handing import copied, in_own_containers

__all__ = ["Ahead", "Loops"]

REMEMBERED = 4  # iterators, each with a batch, in case somebody only seems to have left them


class Ahead(Iterator[Any]):
    """Batches one after the other, of which the next one may be asked for before it is its turn.

    Whatever the source does to make the next batch, it does to its own containers and memory: a batch that is given out
    stays as it was. An error of the source is raised when the batch that it stands for would have had its turn.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches  # never iter() of it, by which some begin anew
        self._next: tuple[Any, bool] | None = None
        self._error: Exception | None = None
        self._is_last = False

    def __next__(self) -> Any:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._next is None:
            batch, self._is_last = self._held()
        else:
            (batch, self._is_last), self._next = self._next, None
            self._tell(self._is_last)
        return batch

    def peek(self) -> Any:
        """The next batch, which will come again; None behind the last one, and before an error."""
        if self._next is None and self._error is None and not self._is_last:
            try:
                self._next = self._held()
            except StopIteration:
                self._is_last = True
            except Exception as error:
                self._error = error
            else:
                self._tell(False)
        return None if self._next is None else self._next[0]

    def is_waited_for(self) -> bool:
        """Whether a batch has been looked at whose turn has not come."""
        return self._next is not None or self._error is not None

    def _held(self) -> tuple[Any, bool]:
        batch, is_last = self._fetched()
        return _kept(batch), is_last

    def _fetched(self) -> tuple[Any, bool]:
        """A batch, and whether it is known to be the last one."""
        return next(self.batches), False

    def _tell(self, is_last: bool) -> None:
        """Say whether the batch whose turn it is is the last one."""


class Loops:
    """Remembers how far loops looked ahead in their caller's own iterators, who may go on with them in others."""

    def __init__(self) -> None:
        self._left: list[Ahead] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy has no part in them

    def ahead_in(self, batches: Iterable[Any]) -> Ahead:
        """The batches; of an iterator that a loop left, first the one that it had looked ahead to."""
        iterator = iter(batches)
        ahead = next((left for left in self._left if left.batches is iterator), None) or Ahead(iterator)
        if iterator is batches:
            others = [left for left in self._left if left is not ahead and left.is_waited_for()]
            self._left = [*others, ahead][-REMEMBERED:]
        return ahead


def _kept(batch: Any) -> Any:
    """A batch in containers of its own, and out of reach of whoever fills arrays anew."""
    own: dict[int, Tensor] = {}

    def tensor_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:  # one that is there twice stays one
            own[id(tensor)] = copied(tensor) if _is_others_memory(tensor) else tensor
        return own[id(tensor)]

    return in_own_containers(batch, tensor_of)


def _is_others_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that others write to, uncounted by torch, such as that of an array."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    try:
        return not (tensor.untyped_storage().resizable() or tensor.is_shared())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # of a subclass without memory of its own
        return False
