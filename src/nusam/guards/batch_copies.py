"""Whether a batch is as it was, and whether its tensors are copied before somebody's code gets them."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nusam.guards.watch import PLAIN

__all__ = ["BatchCopies", "Entries", "Written", "are_same"]


class Written(RuntimeError):
    """A batch was written into, of which there is no copy."""


class Entries:
    """Those of a tensor of a batch, as they were.

    Args:
        tensor: that somebody's code gets.
        copy: the same entries in memory of their own, or None if there is no copy.
    """

    def __init__(self, tensor: Tensor, copy: Tensor | None) -> None:
        self._tensor, self._version, self._copy = tensor, tensor._version, copy
        has_place = type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested
        self._alias = tensor.detach() if has_place else None

    @property
    def are_told(self) -> bool:
        """Whether the tensor itself tells that somebody wrote them."""
        return self._tensor._version != self._version

    def are_written(self) -> bool:
        """Whether somebody wrote them; where there is a copy also through ``.data`` or numpy, which waits for it."""
        return self.are_told or not (self._copy is None or self._alias is None or are_same(self._alias, self._copy))

    def put_back(self) -> None:
        """The memory where they lie, in whose place the tensor may have been given another."""
        if self._alias is not None and _place(self._tensor) != _place(self._alias):
            self._tensor.data = self._alias

    def write_back(self) -> None:
        """As they were."""
        if self._copy is not None:
            self._tensor.copy_(self._copy)


class BatchCopies:
    """They are made until a step has been seen to leave its batch alone, and from a step on that has been seen not to.

    Tensors do not tell what is written through ``.data`` or numpy. So copies are also made in the steps 4, 8, 16, ….

    Args:
        whose: what users call the code.
    """

    def __init__(self, whose: str) -> None:
        self.are_made = True
        self._whose = whose
        self._writes = False
        self._steps = 0
        self._without = 0  # steps since the last one with copies

    def note(self, entries: Iterable[Entries]) -> bool:
        """Whether a call within a step wrote into any of its batch.

        Raises:
            Written: if it did so where no copy had been made.
        """
        written = [each for each in entries if each.are_written()]
        if not written:
            return False
        self._writes = True
        if not self.are_made:
            self.are_made = True
            raise Written(
                f"{self._whose} wrote into a tensor of its batch, which it had not done before, so that no copy is "
                "there for its other calls in the step; write into a clone of it, or do so from the first step on."
            )
        if self._without and not any(each.are_told for each in written):
            warnings.warn(
                f"{self._whose} writes into a tensor of its batch through .data or numpy, which no tensor tells; if it "
                f"did so in up to {self._without} steps before, only its first call in each had the batch as it was; "
                "write into a clone of it, or do so from the first step on.",
                stacklevel=2,
            )
        self._without = 0
        return True

    def step_is_over(self) -> None:
        """What it did tells what the next one will do."""
        self._steps += 1
        self._without = 0 if self.are_made else self._without + 1
        is_due = self._steps > 1 and self._steps & (self._steps + 1) == 0  # the next is the 4th, 8th, 16th, …
        self.are_made, self._writes = self._writes or is_due, False


def are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same entries, or none at the same places."""
    return a.is_meta or torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
