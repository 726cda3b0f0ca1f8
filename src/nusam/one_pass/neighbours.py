"""A batch and the one after it, whose first samples travel behind."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nusam.batch import first_samples, rebuilt, samples_in
from nusam.one_pass.joint import Rows, leaves

__all__ = ["Neighbours", "looked_ahead"]


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


def looked_ahead(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Every batch with the one after it; the last with None.

    Raises:
        ValueError: if the next batch is written over the last one.
    """
    iterator = iter(batches)
    try:
        batch = next(iterator)
    except StopIteration:
        return
    versions = _versions(batch)
    for following in iterator:
        if _versions(batch) != versions:
            raise ValueError(
                "one_pass() looks one batch ahead, which the loader has written into the tensors of the batch before; "
                "let it make new tensors, or loop over opt.passes(*batch)."
            )
        yield batch, following
        batch, versions = following, _versions(following)
    yield batch, None


def _versions(batch: Any) -> list[int]:
    return [tensor._version for tensor in leaves(batch) if not tensor.is_inference()]
