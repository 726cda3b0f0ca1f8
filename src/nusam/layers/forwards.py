"""Forwards that passes put in the place of a module's own, told apart from those that others put there."""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

__all__ = ["has_foreign_forward", "has_our_forward", "ours"]

_OURS: "WeakValueDictionary[int, Any]" = WeakValueDictionary()


def ours(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same, known from now on; by itself: who wraps it may copy its attributes."""
    _OURS[id(forward)] = forward
    return forward


def has_our_forward(module: nn.Module) -> bool:
    """Whether a pass that runs has put one there."""
    forward = vars(module).get("forward")
    return forward is not None and _OURS.get(id(forward)) is forward


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether somebody else has."""
    return "forward" in vars(module) and not has_our_forward(module)
