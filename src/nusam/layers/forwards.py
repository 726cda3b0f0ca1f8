"""Forwards that passes put in the place of a module's own, told apart from those that others put there."""

from functools import partial
from typing import Any

from torch import nn

__all__ = ["has_foreign_forward", "has_our_forward"]


def has_our_forward(module: nn.Module) -> bool:
    """Whether a pass that runs has put one there; known by where it is written, which who wraps it can't copy."""
    forward: Any = vars(module).get("forward")
    function = forward.func if type(forward) is partial else forward
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("nusam.layers.")


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether somebody else has."""
    return "forward" in vars(module) and not has_our_forward(module)
