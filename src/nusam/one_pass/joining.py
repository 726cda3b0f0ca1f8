"""Arguments of two calls made into those of one, whose samples stand behind each other, and its output taken apart."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nusam.containers import entries_of, is_container, rebuilt

__all__ = ["CannotJoin", "Joining", "Roles", "Rows", "leaves", "part_of"]

Roles = dict[tuple[Any, ...], bool]
"""By its place, whether an argument of a call has an entry for each sample, rather than being one for all."""


class CannotJoin(Exception):
    """Two computations can't be joined; ``for_good``: nor will they be in later steps."""

    def __init__(self, reason: str, for_good: bool = True) -> None:
        super().__init__(reason)
        self.for_good = for_good


class Rows(NamedTuple):
    """How many samples come first, and how many behind them."""

    first: int
    second: int


def leaves(part: Any) -> Iterator[Tensor]:
    """The tensors in it."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from leaves(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from leaves(value)
    elif hasattr(part, "__dataclass_fields__"):
        yield from leaves([getattr(part, name, None) for name in part.__dataclass_fields__])


class Joining:
    """Arguments whose tensors and lists have the samples of both; what is no sample must be the same.

    Where one side has more samples than the other, lengths tell what has an entry for each. Where both have as many,
    what a call was given before tells it. Of its first arguments all that may have samples do, which is looked at.

    Args:
        rows: the samples of both.
        tracked: whether autograd is to follow them all.
        roles: of earlier arguments of the call; those of these ones are added.

    Attributes:
        together: the tensors that have samples of both.
    """

    def __init__(self, rows: Rows, tracked: bool, roles: Roles) -> None:
        self._rows, self._tracked, self._roles = rows, tracked, roles
        self._is_first = not roles
        self._known: dict[tuple[int, int], Tensor] = {}  # what is one tensor for both sides stays one
        self.together: list[Tensor] = []

    def of(self, first: Any, second: Any, place: tuple[Any, ...] = ()) -> Any:
        """One argument of both."""
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            if (id(first), id(second)) not in self._known:
                self._known[id(first), id(second)] = self._of_tensors(first, second, place)
            return self._known[id(first), id(second)]
        if type(first) is not type(second):
            raise CannotJoin("gets arguments of several kinds")
        if type(first) in (list, tuple):
            return self._of_lists(first, second, place)
        if is_container(first):
            return self._of_containers(first, second, place)
        try:
            same = first is second or bool(first == second)
        except Exception:
            same = False
        if not same:
            raise CannotJoin(f"gets a {type(first).__name__} that differs from sample to sample")
        return first

    def _has_samples(self, may: bool, place: tuple[Any, ...]) -> bool:
        """Whether an argument that may have an entry for each sample, by its length, has them."""
        if self._rows.first == self._rows.second:
            if place in self._roles:
                return may and self._roles[place]
            if may and not self._is_first:
                raise CannotJoin("gets arguments that it did not get before", for_good=False)
        self._roles[place] = may
        return may

    def _of_lists(self, first: Any, second: Any, place: tuple[Any, ...]) -> Any:
        is_new = place not in self._roles
        has_samples = self._has_samples((len(first), len(second)) == self._rows, place)
        if has_samples and self._is_first and is_new and self._rows.first == self._rows.second:
            try:
                self._roles[place] = False
                return self._of_containers(first, second, place)
            except CannotJoin:  # its entries differ as only samples do
                self._roles[place] = True
        return type(first)([*first, *second]) if has_samples else self._of_containers(first, second, place)

    def _of_containers(self, first: Any, second: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(first, Mapping) and list(first) != list(second):
            raise CannotJoin("gets other arguments with other samples", for_good=False)
        mine, theirs = list(entries_of(first)), list(entries_of(second))
        if len(mine) != len(theirs):
            raise CannotJoin("gets lists of several lengths", for_good=False)
        names = [*(first if isinstance(first, Mapping) else ()), *range(len(mine))]
        joined = [self.of(a, b, (*place, name)) for name, a, b in zip(names, mine, theirs, strict=False)]
        entries = iter(joined)
        try:
            fresh = rebuilt(first, lambda _: next(entries))
            if fresh is None and isinstance(first, list | tuple):
                fresh = type(first)(joined)  # such as torch.Size
        except (AttributeError, RuntimeError, TypeError):  # it can't be written
            fresh = None
        if fresh is None:
            raise CannotJoin(f"gets a {type(first).__name__}, which can't be rebuilt")
        return fresh

    def _of_tensors(self, first: Tensor, second: Tensor, place: tuple[Any, ...]) -> Tensor:
        if first is second:  # no samples, which are other tensors on either side
            return first
        here, there = first.shape[:1], second.shape[:1]
        a, b = (here or (0,))[0], (there or (0,))[0]
        may = a > 0 and b > 0 and a % self._rows.first == 0 and a * self._rows.second == b * self._rows.first
        if self._has_samples(may, place):
            if first.shape[1:] != second.shape[1:]:
                raise CannotJoin("gets samples of shapes that change from batch to batch", for_good=False)
            joined = torch.cat([first, second])
            if self._tracked and joined.is_floating_point() and not joined.requires_grad:
                joined = joined.requires_grad_().clone()  # no leaf, which could not be written
            self.together.append(joined)
            return joined
        if first.shape == second.shape and torch.equal(first, second):
            return first
        if first.shape != second.shape:  # such as positions or a mask, of as many entries as the longest sample
            raise CannotJoin("gets tensors whose shapes change from batch to batch", for_good=False)
        raise CannotJoin("gets a tensor without the samples' dimension, which differs from sample to sample")


def _holds(entry: Any) -> bool:
    return isinstance(entry, Tensor | Mapping | list | tuple)


def part_of(output: Any, rows: Rows, second: bool) -> Any:
    """The rows of one side; what has no rows goes to both."""
    if isinstance(output, Tensor):
        length = output.shape[0] if output.ndim else 0
        if not length or length % sum(rows):
            return output
        cut = length // sum(rows) * rows.first
        return (output[cut:] if second else output[:cut]).clone()  # which a loss may write into
    if type(output) in (list, tuple) and len(output) == sum(rows) and not any(map(_holds, output)):
        return output[rows.first :] if second else output[: rows.first]
    try:
        fresh = rebuilt(output, lambda entry: part_of(entry, rows, second))
    except TypeError as error:  # its copy would be itself
        raise CannotJoin(f"gives a {type(output).__name__}, which can't be rebuilt") from error
    return output if fresh is None else fresh
