"""The first samples of a batch, whatever holds them: tensors, lists, dictionaries, dataclasses."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["first_samples", "rebuilt", "samples_in"]

PACKED = ("cu_seq_lens", "cu_seqlens")  # what begins the names of entries that say where packed sequences end


def first_samples(batch: Any, share: float) -> Any:
    """The first ⌈share·B⌉ of a batch's B samples; the batch itself if that is all of them, and never written.

    B is the first dimension of the first tensor, those further out first. Every tensor, array, list and tuple of that
    length is cut; what has another length is handed on whole. Lists of dictionaries, strings or numbers, or of tensors
    of several lengths, are lists of samples.

    Args:
        batch: a tensor, or containers of tensors (lists, tuples, mappings, dataclasses).
        share: in (0, 1].

    Raises:
        ValueError: if nothing has a first dimension, or samples are packed into one sequence.
    """
    _refuse_packed(batch)
    size = _size(batch)
    if size is None:
        raise ValueError(
            f"ascent_share={share:g} needs a batch with a first dimension to cut, got {_described(batch)}; hand over "
            "the tensors of the batch, or use ascent_share=1."
        )
    count = math.ceil(share * size * (1 - 1e-12))  # 0.1 · 30 is a little more than 3
    return batch if count == size else _cut(batch, size, count, outermost=True)


def samples_in(batch: Any) -> int:
    """B, the number of a batch's samples.

    Raises:
        ValueError: if nothing in it has a first dimension.
    """
    size = _size(batch)
    if size is None:
        raise ValueError(f"A batch needs a first dimension, got {_described(batch)}; hand over its tensors.")
    return size


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
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fresh = copy.copy(part)
        for field in dataclasses.fields(part):
            object.__setattr__(fresh, field.name, change(getattr(part, field.name)))
        return fresh
    return None


def _cut(part: Any, size: int, count: int, outermost: bool = False) -> Any:
    if _has_rows(part):
        if not (part.ndim and part.shape[0] == size):
            return part
        return part.narrow_copy(0, 0, count) if _is_sparse(part) else part[:count]
    if isinstance(part, list | tuple) and len(part) == size and not outermost and not _holds_rows_of(part, size):
        first = part[:count]
        return first if type(part) in (list, tuple) else type(part)(first)
    fresh = rebuilt(part, lambda entry: _cut(entry, size, count))
    return part if fresh is None else fresh


def _size(batch: Any) -> int | None:
    """B, or None."""
    level = [batch] if _has_rows(batch) else list(_entries(batch))
    while level:
        found = next((part.shape[0] for part in level if _has_rows(part) and part.ndim), None)
        if found is not None:
            return int(found)
        lists = [part for part in level if isinstance(part, list | tuple) and part]
        lengths = {len(part) for part in lists}
        if len(lengths) == 1 and any(_are_samples(part) for part in lists):
            return lengths.pop()
        level = [entry for part in level for entry in _entries(part)]
    return None


def _are_samples(part: Any) -> bool:
    """Whether a list's entries are samples rather than tensors of many samples."""
    if not all(_has_rows(entry) for entry in part):
        return not any(isinstance(entry, list | tuple) or _has_rows(entry) for entry in part)
    return len({entry.shape[:1] for entry in part}) > 1


def _holds_rows_of(part: Any, size: int) -> bool:
    """Whether a list of as many entries as there are samples is one of tensors that have that many each."""
    return bool(part) and all(_has_rows(entry) and entry.ndim > 0 and entry.shape[0] == size for entry in part)


def _entries(part: Any) -> Iterator[Any]:
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, list | tuple):
        yield from part
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield from (getattr(part, field.name) for field in dataclasses.fields(part))


def _has_rows(part: Any) -> bool:
    return isinstance(part, Tensor) or (type(part).__module__ == "numpy" and type(part).__name__ == "ndarray")


def _is_sparse(part: Any) -> bool:
    return isinstance(part, Tensor) and part.layout != torch.strided


def _refuse_packed(part: Any) -> None:
    names = list(part) if isinstance(part, Mapping) else []
    packed = isinstance(part, PackedSequence) or any(str(name).startswith(PACKED) for name in names)
    if packed or (isinstance(part, Tensor) and part.is_nested):
        raise ValueError(
            f"A share of {_described(part)}, whose samples are packed into one sequence, can't be cut off; use "
            "ascent_share=1, or batches that are padded."
        )
    for entry in _entries(part):
        _refuse_packed(entry)


def _described(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"a {type(part).__name__} of {', '.join(map(str, part)) or 'nothing'}"
    if isinstance(part, Tensor):
        return f"a tensor of shape {tuple(part.shape)}" if not part.is_nested else "a nested tensor"
    return f"a {type(part).__name__}"
