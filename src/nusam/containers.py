"""What holds the tensors of a batch: lists, dictionaries, dataclasses, and objects that nobody can look into."""

import copy
import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NUMBERS",
    "PLAIN",
    "attributes_beside",
    "described",
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
    """A container of the same kind with changed entries; None if it is no container that can be made anew.

    ``change`` gets the entries in the order of :func:`entries_of`. Cached properties are to be computed anew.

    Raises:
        TypeError: if what is written to a copy may show in the container itself, which is then as it was.
    """
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(map(change, part))
    if type(part) in (list, tuple):
        return type(part)(map(change, part))
    if type(part) is dict:
        return {name: change(value) for name, value in part.items()}
    if not (isinstance(part, MutableMapping) or is_a_dataclass(part)):
        return None
    changed = {name: change(value) for name, value in _named(part).items()}
    beside = {name: change(value) for name, value in attributes_beside(part).items()}
    fresh = _copied(part)
    _fill(fresh, changed, part)
    for name, value in beside.items():
        object.__setattr__(fresh, name, value)
    for name in [name for name in getattr(fresh, "__dict__", ()) if _is_cached(part, name)]:
        del fresh.__dict__[name]
    return fresh


def _fill(fresh: Any, changed: dict[Any, Any], part: Any) -> None:
    """Write to a copy, and see to it that the container itself keeps its entries."""
    is_mapping = isinstance(part, Mapping)
    get: Callable[[Any, Any], Any] = operator.getitem if is_mapping else getattr
    put: Callable[[Any, Any, Any], None] = operator.setitem if is_mapping else object.__setattr__
    entries = _named(part)
    if any(get(part, name) is not value for name, value in entries.items()):
        raise _not_to_be_copied(part, "makes its entries whenever they are asked for")
    try:
        for name, value in changed.items():
            put(fresh, name, value)
    finally:
        written = [name for name, value in entries.items() if get(part, name) is not value]
        for name in written:
            put(part, name, entries[name])
    if written:
        raise _not_to_be_copied(part, "shares its entries with its copy")


def _copied(part: Any) -> Any:
    """A copy, of which the mappings that a mapping keeps its entries in are others."""
    fresh = copy.copy(part)
    if fresh is part:
        raise _not_to_be_copied(part, "is its own copy")
    if isinstance(part, MutableMapping):
        for name, value in _attributes(part).items():
            if isinstance(value, MutableMapping) and _attributes(fresh).get(name) is value:
                object.__setattr__(fresh, name, _copied(value))
    return fresh


def _not_to_be_copied(part: Any, why: str) -> TypeError:
    kind = type(part).__name__
    return TypeError(f"A {kind} {why}, so that one with other entries can't be made; hand over a dictionary of them.")


def entries_of(part: Any) -> Iterator[Any]:
    """What a container holds; nothing if it is none."""
    if isinstance(part, list | tuple):  # whose attributes would get lost
        yield from part
    elif is_container(part):
        yield from _named(part).values()
        yield from attributes_beside(part).values()


def attributes_beside(part: Any) -> dict[str, Any]:
    """Attributes that hold tensors beside a container's entries, such as those that ``__post_init__`` makes."""
    if type(part) in (dict, list, tuple):
        return {}
    own = {name: value for name, value in _attributes(part).items() if not isinstance(value, PLAIN)}
    if is_a_dataclass(part) and not isinstance(part, Mapping):
        own = {name: value for name, value in own.items() if name not in _named(part)}
    if not own:
        return {}
    entries = list(part if isinstance(part, list | tuple) else _named(part).values())
    known = set(map(id, entries))
    own = {name: value for name, value in own.items() if not _is_cached(part, name)}
    return {name: value for name, value in own.items() if _holds_tensors(value, DEEP, known)}


def _named(part: Any) -> dict[Any, Any]:
    """The entries of a mapping, the fields of a dataclass."""
    if isinstance(part, Mapping):
        return dict(part.items())
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if hasattr(part, field.name)}


def _attributes(part: Any) -> dict[str, Any]:
    slots = _slots(type(part))  # type: ignore[arg-type]
    return {**{name: getattr(part, name, None) for name in slots}, **getattr(part, "__dict__", {})}


@functools.lru_cache(maxsize=256)
def _slots(kind: type[Any]) -> tuple[str, ...]:
    names = (name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))
    return tuple(name for name in names if name[:2] != "__")


def _is_cached(part: Any, name: str) -> bool:
    """Whether an attribute is what a property has left, which is computed of the others."""
    return isinstance(getattr(type(part), name, None), functools.cached_property)


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


def _holds_tensors(part: Any, deep: int, known: Container[int] = ()) -> bool:
    """Whether there are tensors in its entries and attributes, or in theirs, other than in objects of known ids."""
    if id(part) in known or isinstance(part, PLAIN) or callable(part):
        return False
    if has_rows(part):
        return True
    if not deep or (is_list(part) and is_list_of_plain(part)):
        return False
    entries = part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
    return any(_holds_tensors(one, deep - 1, known) for one in (*_attributes(part).values(), *entries))


def described(part: Any) -> str:
    """What something is, in a few words."""
    if isinstance(part, Mapping):
        return f"a {type(part).__name__} of {', '.join(map(str, part)) or 'nothing'}"
    if isinstance(part, Tensor):
        return f"a tensor of shape {tuple(part.shape)}" if not part.is_nested else "a nested tensor"
    return f"a {type(part).__name__}"
