"""An iterator that can tell what comes next."""

from collections.abc import Iterator
from typing import Any

__all__ = ["Ahead"]


class Ahead(Iterator[Any]):
    """Batches one after the other, of which the next one may be asked for before it is its turn."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches  # never iter() of it, by which some begin anew
        self._next: tuple[Any, bool] | None = None
        self._is_last = False

    def __next__(self) -> Any:
        if self._next is None:
            batch, self._is_last = self._fetched()
        else:
            (batch, self._is_last), self._next = self._next, None
            self._tell(self._is_last)
        return batch

    def peek(self) -> Any:
        """The next batch, which will come again; None behind the last one."""
        if self._next is None and not self._is_last:
            try:
                self._next = self._fetched()
            except StopIteration:
                self._is_last = True
            else:
                self._tell(False)
        return None if self._next is None else self._next[0]

    def _fetched(self) -> tuple[Any, bool]:
        """A batch, and whether it is known to be the last one."""
        return next(self.batches), False

    def _tell(self, is_last: bool) -> None:
        """Say whether the batch whose turn it is is the last one."""
