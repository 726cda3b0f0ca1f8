"""Undoing what was begun, even when a signal lands in the middle of the undoing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["always", "around_backwards", "entered", "remove_hook"]


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


@contextmanager
def around_backwards(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, backwards go through what ``make`` makes of the function by which torch hands them to its engine."""
    module: Any = torch.autograd
    run = module._engine_run_backward

    def undo() -> None:
        module._engine_run_backward = run

    with always(undo):
        module._engine_run_backward = make(run)
        yield


def remove_hook(tensor: Tensor, hook: Callable[..., None]) -> None:
    """Take a hook from a tensor, by itself: an interrupt may come before the handle to it is kept.

    If it was the last one the tensor is left without a dict of hooks: where torch swaps tensors (``load_state_dict`` if
    told so, ``Module.to``) it leaves the dict in its place, and what is put into it then is never called.
    """
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, name, None)
        if hooks is None:
            continue
        for key in [key for key, known in hooks.items() if known == hook]:
            hooks.pop(key, None)
        if not hooks:
            setattr(tensor, name, None)
