"""What holds the tensors of a batch: lists, dictionaries, dataclasses, and objects that nobody can look into."""

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NUMBERS",
    "PLAIN",
    "entries_of",
    "first_rows",
    "has_rows",
    "is_a_dataclass",
    "is_container",
    "is_fractional",
    "is_list",
    "is_list_of_plain",
    "is_plain",
    "leaves_of",
    "rebuilt",
]

NUMBERS = (bool, int, float, complex)
PLAIN = (*NUMBERS, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
DEEP = 4  # attributes of attributes up to which tensors are looked for


def rebuilt(part: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same kind with changed entries; None if it is no container that can be made anew."""
    if isinstance(part, MutableMapping):
        fresh: Any = copy.copy(part)
        for name, value in part.items():
            fresh[name] = change(value)
        return fresh
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(map(change, part))
    if type(part) in (list, tuple):
        return type(part)(map(change, part))
    if is_a_dataclass(part):
        fresh = copy.copy(part)
        for field in dataclasses.fields(part):
            object.__setattr__(fresh, field.name, change(getattr(part, field.name)))
        return fresh
    return None


def entries_of(part: Any) -> Iterator[Any]:
    """What a container holds; nothing if it is none."""
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, list | tuple):
        yield from part
    elif is_a_dataclass(part):
        yield from (getattr(part, field.name, None) for field in dataclasses.fields(part))


def leaves_of(part: Any) -> Iterator[Any]:
    """What is no container itself; lists of numbers and strings are left out."""
    if not is_container(part):
        yield part
    elif not (is_list(part) and is_list_of_plain(part)):
        for entry in entries_of(part):
            yield from leaves_of(entry)


def is_container(part: Any) -> bool:
    return isinstance(part, Mapping | list | tuple) or is_a_dataclass(part)


def is_a_dataclass(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def is_list(part: Any) -> bool:
    """Whether it is a list or tuple without names for its entries."""
    return isinstance(part, list | tuple) and not hasattr(part, "_make")


def is_list_of_plain(part: Any) -> bool:
    """Whether a list holds numbers and strings alone."""
    return all(issubclass(kind, PLAIN) for kind in set(map(type, part)))


def is_plain(part: Any) -> bool:
    """Whether it is one thing, without samples inside."""
    if isinstance(part, PLAIN) or callable(part):
        return True
    return not (hasattr(part, "__len__") or hasattr(part, "__iter__") or _holds_tensors(part, DEEP))


def has_rows(part: Any) -> bool:
    """Whether it is a tensor or an array of numpy's."""
    return isinstance(part, Tensor) or (type(part).__module__ == "numpy" and type(part).__name__ == "ndarray")


def is_fractional(part: Any) -> bool:
    return part.is_floating_point() if isinstance(part, Tensor) else part.dtype.kind == "f"


def first_rows(part: Any, count: int) -> Any:
    """The first rows of a tensor or array, in its own layout."""
    if not isinstance(part, Tensor) or part.layout == torch.strided:
        return part[:count]
    return part.to_sparse(layout=torch.sparse_coo).narrow_copy(0, 0, count).to_sparse(layout=part.layout)


def _holds_tensors(part: Any, deep: int) -> bool:
    if has_rows(part):
        return True
    if isinstance(part, PLAIN) or callable(part) or not deep:
        return False
    slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
    held = [*(getattr(part, name, None) for name in slots), *getattr(part, "__dict__", {}).values(), *entries_of(part)]
    return any(_holds_tensors(one, deep - 1) for one in held)
