"""A batch and the one after it, whose first samples travel behind."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nusam.batch import first_samples, rebuilt, samples_in
from nusam.containers import has_rows, leaves_of
from nusam.guards.batch_copies import are_same
from nusam.one_pass.joint import Rows, leaves
from nusam.one_pass.looking_ahead import Ahead

__all__ = ["Neighbours", "are_the_same", "looked_ahead"]


class Neighbours(NamedTuple):
    """Two batches, and the first samples of the second."""

    batch: Any
    following: Any
    ahead: Any

    @classmethod
    def of(cls, batch: Any, following: Any, share: float) -> "Neighbours":
        """Whose samples ahead are in tensors other than those of the batch, though both may be the same one."""
        ahead = first_samples(following, share)
        return cls(batch, following, _apart(ahead, samples_in(following)) if ahead is following else ahead)

    @property
    def rows(self) -> Rows:
        """The samples of both sides."""
        return Rows(samples_in(self.batch), samples_in(self.ahead))


def _apart(part: Any, size: int) -> Any:
    if isinstance(part, Tensor):
        return part.view_as(part) if part.layout == torch.strided and part.shape[:1] == (size,) else part
    fresh = rebuilt(part, lambda entry: _apart(entry, size))
    return part if fresh is None else fresh


def looked_ahead(batches: Ahead) -> Iterator[tuple[Any, Any]]:
    """Every batch with the one after it; the last with None.

    Raises:
        ValueError: if the next batch is written over the last one.
    """
    following = before = None
    for batch in batches:
        if batch is not following or before is None:
            before = _Contents(batch, copies=True)
        inside = _inside_objects(batch)
        following = batches.peek()
        share_memory = _share_memory(batch, following)
        are_filled_anew = any(a is not b for a, b in zip_longest(inside, _inside_objects(batch)))
        if before.differ(share_memory) or are_filled_anew:
            raise ValueError(
                "one_pass() looks one batch ahead, which the loader has written into the tensors of the batch before; "
                "let it make new tensors, or loop over opt.passes(*batch)."
            )
        before = _Contents(following, copies=share_memory)
        yield batch, following


class _Contents:
    """What the tensors of a batch hold.

    Args:
        copies: whether to see writes too that torch does not count, as through ``.data`` or in another process.
    """

    def __init__(self, batch: Any, copies: bool) -> None:
        self._tensors = list(leaves(batch))
        self._versions = self._counted()
        self._copies = [tensor.detach().clone() for tensor in self._tensors] if copies else []

    def differ(self, in_copies: bool) -> bool:
        """Whether they now hold something else; ``in_copies``: whether to compare numbers, if they were copied."""
        pairs = zip(self._tensors, self._copies if in_copies else [], strict=False)
        return self._counted() != self._versions or any(not _are_equal(a, b) for a, b in pairs)

    def _counted(self) -> list[int]:
        return [tensor._version for tensor in self._tensors if not tensor.is_inference()]


def _inside_objects(batch: Any) -> list[Any]:
    """Tensors and arrays of objects that nobody can make anew."""
    objects = [part for part in leaves_of(batch) if not (has_rows(part) or callable(part))]
    return [value for part in objects for value in getattr(part, "__dict__", {}).values() if has_rows(value)]


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.layout != torch.strided or are_same(a, b)


def _share_memory(batch: Any, other: Any) -> bool:
    """Whether tensors of two batches overlap."""
    mine, theirs = _spans(batch), _spans(other)
    return any(
        start < other_end and other_start < end
        for storage in mine.keys() & theirs.keys()
        for start, end in mine[storage]
        for other_start, other_end in theirs[storage]
    )


def _spans(batch: Any) -> dict[int, list[tuple[int, int]]]:
    """Of every storage what the tensors of a batch take of it, from one byte to another."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for tensor in leaves(batch):
        if type(tensor) is Tensor and tensor.layout == torch.strided and tensor.numel():
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset()) * tensor.itemsize
            own = spans.setdefault(tensor.untyped_storage().data_ptr(), [])
            own.append((start, start + length * tensor.itemsize))
    return spans


def are_the_same(batch: Any, other: Any) -> bool:
    """Whether two batches hold the same tensors, though in containers of their own."""
    if batch is other:
        return True
    pairs = list(leaves(batch)), list(leaves(other))
    return len(pairs[0]) == len(pairs[1]) > 0 and all(a is b for a, b in zip(*pairs, strict=True))
