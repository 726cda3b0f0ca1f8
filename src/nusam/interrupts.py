"""Undoing what was begun, even when a signal lands in the middle of the undoing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["always"]


@contextmanager
def always(undo: Callable[[], None]) -> Iterator[None]:
    """Run the body, then ``undo``, which must bear repetition, even if an interrupt cuts its first run short."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()
