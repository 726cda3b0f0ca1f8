"""Undoing what was begun, even when a signal lands in the middle of the undoing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

__all__ = ["always", "entered", "remove_hook"]


@contextmanager
def always(undo: Callable[[], None]) -> Iterator[None]:
    """Run the body, then ``undo``, which must bear repetition, even if an interrupt cuts its first run short."""
    undone = False
    try:
        try:
            yield
        finally:
            undo()
            undone = True
    finally:
        if not undone:
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


def remove_hook(tensor: Tensor, hook: Callable[..., None]) -> None:
    """Take a hook from a tensor, by itself: an interrupt may come before the handle to it is kept."""
    for hooks in (tensor._backward_hooks or {}, getattr(tensor, "_post_accumulate_grad_hooks", None) or {}):
        for key in [key for key, known in hooks.items() if known == hook]:
            hooks.pop(key, None)
