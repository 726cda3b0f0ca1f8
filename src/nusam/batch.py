"""The first samples of a batch, whatever holds them: tensors, lists, dictionaries, dataclasses.

What a sample is has to be certain. A batch is read as one of B samples for every B that it might have: the first
dimension of each tensor in it, and the length of each list. It is cut if one reading alone accounts for all of it.
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from nusam.containers import (
    NUMBERS,
    PLAIN,
    attributes_beside,
    described,
    entries_of,
    first_rows,
    has_rows,
    is_container,
    is_fractional,
    is_list,
    is_list_of_plain,
    is_plain,
    leaves_of,
    rebuilt,
)
from nusam.packed import (
    may_be_of_positions,
    may_say_how_long,
    may_say_whose,
    named_weights_in,
    packed_in,
    packed_rows_in,
)

__all__ = ["first_samples", "rebuilt", "samples_in"]

FIELDS, CHANNELS = 4, (1, 3, 4)  # of a sample at most, and of an image
INSTEAD = (
    "hand over tensors whose first dimension is the batch and leave out what all samples share, cut it yourself in "
    "'with opt.ascent():' and 'with opt.descent():', or use ascent_share=1."
)


def first_samples(batch: Any, share: float) -> Any:
    """The first ⌈share·B⌉ of a batch's B samples; the batch itself if that is all of them, and never written.

    Every tensor and array of B rows is cut, and every list of B samples. Handed on whole is what all samples share: a
    single number, row or string, a list of strings or numbers of another length, a vector of fewer numbers with a
    fraction (class weights), and masks and positions of shape (T, T) or (1, T) beside (B, T). Fewer numbers are refused
    where others may say which of them each row belongs to.

    A tuple of tensors has them side by side, as ``passes(x, y)`` hands them over. So has a batch that lists at most
    four tensors of one shape, as loaders do with pairs and triplets, unless it is an image's. Any other list may have
    samples in it or tensors side by side: it is what makes sense of the rest of the batch.

    Args:
        batch: a tensor, or containers of tensors (lists, tuples, mappings, dataclasses).
        share: in (0, 1].

    Raises:
        ValueError: if nothing has a first dimension, if samples are packed into one sequence, if something belongs to
            no sample or to all and can't be told, or if the batch may be one of several numbers of samples.
    """
    packed = next(packed_in(batch), None)
    if packed is not None:
        raise _packed(packed)
    if share == 1:
        return batch
    try:
        reading = _read(batch)
    except _Unclear as reason:
        raise ValueError(f"ascent_share={share:g} can't cut {described(batch)}, {reason}; {INSTEAD}") from None
    if reading is None:
        raise ValueError(
            f"ascent_share={share:g} needs a batch with a first dimension to cut, got {described(batch)}; hand over "
            "the tensors of the batch, or use ascent_share=1."
        )
    packed = next(packed_rows_in(batch), None) if reading.size == 1 else None
    if packed is not None:
        raise _packed(packed)
    count = math.ceil(share * reading.size * (1 - 1e-12))  # 0.1 · 30 is a little more than 3
    return batch if count == reading.size else reading.cut(batch, count)


def samples_in(batch: Any) -> int:
    """B, the number of a batch's samples; if that is unclear, the first tensor's first dimension.

    Raises:
        ValueError: if nothing in it has a first dimension.
    """
    try:
        reading = _read(batch)
        size = None if reading is None else reading.size
    except _Unclear:
        size = next(_rows(batch), None)
    if size is None:
        raise ValueError(f"A batch needs a first dimension, got {described(batch)}; hand over its tensors.")
    return size


class _Unclear(Exception):
    """It can't be told what a sample is."""


class _Misfit(Exception):
    """Something is there that a batch of so many samples does not have."""


class _Reading:
    """A batch, read as one of ``size`` samples.

    Args:
        batch: what ``passes`` was given.
        size: B.
        parallel: whether lists of that length stand side by side, one of which holds no tensors but dictionaries.

    Raises:
        _Misfit: if something has another number of rows.
        _Unclear: if a list has B samples as well as it has tensors of B rows.
    """

    def __init__(self, batch: Any, size: int, parallel: bool) -> None:
        self.size = size
        self._batch = batch
        self.left = 0  # numbers, rows and lists of them that no sample has a part in
        self._parallel = parallel
        self._lists: dict[int, Any] = {}  # those of samples
        self._numbered: dict[tuple[int, bool], bool] = {}
        tensors = [part for part in leaves_of(batch) if has_rows(part) and part.shape[:1] == (size,)]
        self._widths = {1}.union(*(part.shape[1:] for part in tensors))
        squares = (part for part in tensors if part.shape[:2] == (size, size))
        self._sequences = [part for part in squares if part.ndim > 2 or not is_fractional(part)]  # as long as there are
        self.cuts = self._visit(batch, type(batch) is not list)

    def cut(self, part: Any, count: int) -> Any:
        """The first samples of what was read."""
        if has_rows(part):
            return first_rows(part, count) if part.shape[:1] == (self.size,) else part
        if id(part) in self._lists:
            first = part[:count]
            return first if type(part) in (list, tuple) else type(part)(first)
        if not is_container(part):
            return part
        try:
            fresh = rebuilt(part, lambda entry: self.cut(entry, count))
        except Exception as error:
            raise ValueError(f"A {type(part).__name__} can't be filled with a share of itself; {INSTEAD}") from error
        return part if fresh is None else fresh

    def _visit(self, part: Any, side_by_side: bool = False) -> bool:
        """Whether there is something to cut in it.

        ``side_by_side``: whether tensors and lists in it are no samples, as in the arguments of ``passes``.
        """
        if has_rows(part):
            return self._visit_tensor(part)
        if is_list(part):
            return self._visit_list(part, side_by_side)
        if is_container(part):
            found = True in [self._visit(entry) for entry in entries_of(part)]
            if found and isinstance(part, Mapping) and not isinstance(part, MutableMapping):
                raise _Misfit(f"which holds a {type(part).__name__} that nothing can be written to")
            return found
        if isinstance(part, NUMBERS):
            self.left += 1
        elif not is_plain(part):
            raise _Misfit(f"which holds a {type(part).__name__}, an object that can't be cut")
        return False

    def _visit_tensor(self, part: Any) -> bool:
        if part.shape[:1] == (self.size,):
            if any(one is not part for one in self._sequences) and may_be_of_positions(part):
                raise _Misfit(f"which holds a tensor of shape {tuple(part.shape)} of as many positions as samples")
            return True
        if not self._is_shared(part):
            raise _Misfit(f"which holds a tensor of shape {tuple(part.shape)} beside {self.size} samples")
        self.left += 1
        return False

    def _is_shared(self, part: Any) -> bool:
        """Whether a tensor of another length is one for all samples."""
        if not part.ndim:
            return True
        rows = part.shape[0]
        if part.ndim == 1:
            may_be = rows < self.size and not self._may_be_numbered(rows, False)
            return rows == 1 or (is_fractional(part) and (self._are_weights(part) or may_be))
        if part.ndim > 2 and self.size in part.shape[1:]:  # samples in another dimension, as a recurrent state has them
            return False
        of_their_width = part.shape[-1] in self._widths
        return bool(of_their_width and (rows == 1 or part.shape == part.shape[-1:] * 2))

    def _visit_list(self, part: Any, side_by_side: bool) -> bool:
        if attributes_beside(part):
            raise _Misfit(f"which holds a {type(part).__name__} with tensors beside its entries")
        if len(part) != self.size and may_say_how_long(part, self.size):
            raise _Misfit(f"which holds whole numbers, {part!r:.50}, that may say how samples are packed into one")
        if is_list_of_plain(part):
            if 1 < len(part) < self.size and self._may_be_numbered(len(part), True):
                raise _Misfit(f"which holds a list of {len(part)} beside {self.size} rows that may be numbered by them")
            self.left += len(part) != self.size
            return len(part) == self.size and not side_by_side and self._has_samples(part)
        may_be_samples = len(part) == self.size and not (side_by_side and _is_of_fields(part))
        if may_be_samples and self._parallel and not side_by_side:
            return self._has_samples(part)
        is_collated = part is self._batch and _is_collated(part)
        may_be_samples = may_be_samples and _are_alike(part) and not is_collated
        left, lists = self.left, dict(self._lists)
        try:
            found = True in [self._visit(entry) for entry in part]
        except _Misfit:
            if not may_be_samples:
                raise
            found = False
        if found and type(part) not in (list, tuple) and not may_be_samples:
            raise _Misfit(f"which holds a {type(part).__name__} that can't be made anew")
        if not found and (any(map(is_container, part)) if len(part) != self.size else not may_be_samples):
            raise _Misfit(f"which holds a {type(part).__name__} of {len(part)} beside {self.size} samples")
        if not may_be_samples or (found and _is_tuple_of_flat(part)):
            return found
        if found and self.left == left:
            raise _Unclear(f"in which a list may have {self.size} samples, or tensors of {self.size} samples each")
        self.left, self._lists = left, lists
        return self._has_samples(part)

    def _may_be_numbered(self, count: int, each: bool) -> bool:
        """Whether something may say to which of so many samples each row belongs."""
        if (count, each) not in self._numbered:
            self._numbered[count, each] = may_say_whose(self._batch, self.size, count, each)
        return self._numbered[count, each]

    def _are_weights(self, part: Any) -> bool:
        return any(part is one for one in named_weights_in(self._batch))

    def _has_samples(self, part: Any) -> bool:
        self._lists[id(part)] = part
        return True


def _read(batch: Any) -> _Reading | None:
    """The one reading that leaves the least out; None if there is nothing to cut.

    Raises:
        _Unclear: if there are several, or none.
    """
    parallel = _parallel(batch)
    sizes = dict.fromkeys([*_rows(batch), *_lengths(batch)] if parallel is None else [parallel])
    readings, misfits = [], []
    for size in sizes:
        try:
            reading = _Reading(batch, size, parallel is not None)
        except _Misfit as reason:
            misfits.append(str(reason))
        else:
            readings += [reading] if reading.cuts else []
    least = min((reading.left for reading in readings), default=0)
    best = [reading for reading in readings if reading.left == least]
    if len(best) > 1:
        raise _Unclear(f"which may be one of {' or '.join(str(reading.size) for reading in best)} samples")
    if not best and misfits:
        raise _Unclear(misfits[0])
    return best[0] if best else None


def _parallel(batch: Any) -> int | None:
    """The length of lists side by side of which one has dictionaries or objects in it, as detectors take them.

    Raises:
        _Unclear: if lists in a tuple may be conversations, each of which is a sample.
    """
    lists = [entry for entry in entries_of(batch) if is_list(entry) and entry]
    lengths = [len(entry) for entry in lists]
    are_alike = is_list(batch) and len(set(map(_kind, lists))) == 1
    for entry in lists:
        is_of_samples = not any(has_rows(one) or is_list(one) or isinstance(one, PLAIN) for one in entry)
        if is_of_samples and lengths.count(len(entry)) > 1:
            if are_alike and type(batch) is list:
                return None
            if are_alike and next(_rows(batch), None) is None:
                raise _Unclear(f"in which a tuple may have {len(lists)} samples, or lists of {len(entry)} samples each")
            return len(entry)
    return None


def _lengths(part: Any) -> Iterator[int]:
    """The lengths of lists."""
    if is_list(part) and part:
        yield len(part)
        if is_list_of_plain(part):
            return
    for entry in entries_of(part):
        yield from _lengths(entry)


def _rows(part: Any) -> Iterator[int]:
    """The first dimensions of the tensors."""
    return (int(tensor.shape[0]) for tensor in leaves_of(part) if has_rows(tensor) and tensor.ndim)


def _are_alike(part: Any) -> bool:
    """Whether a list's entries may be samples of one kind, of which some are missing."""
    part = [entry for entry in part if entry is not None]
    if not all(map(has_rows, part)):
        return len({_kind(entry) for entry in part}) == 1
    if len({_kind(entry) for entry in part}) > 1:
        return False
    shapes = {tuple(entry.shape) for entry in part}
    if len(part) == 2 and len({shape[:1] + shape[2:] for shape in shapes}) == 1 < len(shapes):
        return False  # an input, and a target of another width
    return len({shape[:1] for shape in shapes}) == 1 or len({shape[1:] for shape in shapes}) == 1


def _kind(part: Any) -> Any:
    """What samples of one kind have in common."""
    if has_rows(part):
        return part.dtype, part.ndim
    if isinstance(part, Mapping):
        return frozenset(part)
    if is_list(part):
        return list, frozenset(map(type, part) if is_list_of_plain(part) else map(_kind, part))
    return type(part)


def _is_of_fields(part: Any) -> bool:
    """Whether a tuple has tensors or lists in it, which stand side by side then."""
    return any(has_rows(entry) or is_list(entry) or isinstance(entry, PLAIN) for entry in part)


def _is_collated(part: Any) -> bool:
    """Whether a batch lists few tensors of one shape, as loaders make it of pairs and triplets, not of images."""
    if not (1 < len(part) <= FIELDS and all(map(has_rows, part)) and len({entry.shape for entry in part}) == 1):
        return False
    shape = part[0].shape
    return len(shape) > 0 and not (len(shape) == 3 and shape[0] in CHANNELS)


def _is_tuple_of_flat(part: Any) -> bool:
    """Whether it is a tuple of vectors and matrices, rather than of images."""
    return type(part) is tuple and all(has_rows(entry) and entry.ndim < 3 for entry in part)


def _packed(part: Any) -> ValueError:
    return ValueError(
        f"A share of {described(part)}, whose samples are packed into one sequence, can't be cut off; use "
        "ascent_share=1, or batches that are padded."
    )
