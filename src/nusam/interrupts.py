"""Undoing what was begun, even when a signal lands in the middle of the undoing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

__all__ = ["always", "entered"]


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


@contextmanager
def entered(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Run the body inside contexts that are left in any case; after a plain ``with`` an interrupt can come before that.

    Autocast left so would go on using the half-precision copies of weights that it has.
    """
    stack = ExitStack()
    with always(stack.close):
        for context in contexts:
            stack.enter_context(context)
        yield
