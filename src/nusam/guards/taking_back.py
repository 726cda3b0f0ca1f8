"""What gives a thing back the contents that it had, whatever was written into it."""

import copy
import io
import random
import sys
from collections import deque
from collections.abc import Callable, MutableMapping
from functools import partial
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

__all__ = ["can_be_looked_into", "is_a_writable_container", "is_an_array", "refill", "slots_of", "undo_of"]


OPAQUE = (nn.Module, Optimizer, Dataset, ModuleType, io.IOBase)  # none of which is a batch's own


def can_be_looked_into(thing: Any) -> bool:
    """Whether an object holds what it holds in its attributes, rather than in a file that it reads from when asked."""
    if callable(thing) or isinstance(thing, OPAQUE):
        return False
    return not any(isinstance(value, io.IOBase) for value in getattr(thing, "__dict__", {}).values())


def is_a_writable_container(thing: Any) -> bool:
    return isinstance(thing, MutableMapping | list | set | deque | bytearray)


def is_an_array(thing: Any) -> bool:
    """Whether it is an array of numpy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, numpy.ndarray)


def undo_of(thing: Any) -> Callable[[], None] | None:
    """What takes back all that is written into an array, or drawn from a generator; None for other things."""
    if isinstance(thing, torch.Generator):
        return partial(_set_state, thing, thing.get_state())
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):
        return partial(thing.setstate, thing.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if is_an_array(thing) and thing.flags.writeable:
        return partial(thing.__setitem__, ..., thing.copy())
    if isinstance(thing, numpy.random.Generator):
        return partial(setattr, thing.bit_generator, "state", copy.deepcopy(thing.bit_generator.state))
    if isinstance(thing, numpy.random.RandomState):
        return partial(thing.set_state, thing.get_state())
    return None


def refill(container: Any, before: Any) -> None:
    """Give a container the entries that it had, in their order; nothing is written to one that has them."""
    if isinstance(container, set):
        container.clear()
        container.update(before)
    elif isinstance(container, MutableMapping):
        if list(container) != list(before) or any(container[name] is not value for name, value in before.items()):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.extend(before)


def slots_of(thing: Any) -> dict[str, Any]:
    """The attributes that an object keeps in slots."""
    kinds = (vars(kind) for kind in type(thing).__mro__ if "__slots__" in vars(kind))
    slots = [name for kind in kinds for name, entry in kind.items() if isinstance(entry, MemberDescriptorType)]
    return {name: getattr(thing, name) for name in slots if hasattr(thing, name)}


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)
