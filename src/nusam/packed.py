"""Batches in which rows are no samples: these stand in one sequence, one behind the other, or rows are positions."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nusam.containers import entries_of, has_rows, is_list, is_list_of_plain

__all__ = [
    "may_be_of_positions",
    "may_say_how_long",
    "may_say_whose",
    "named_weights_in",
    "packed_in",
    "packed_rows_in",
]

# what begins the names of entries that say where packed sequences end
ENDS = ("cu_seq_lens", "cu_seqlens", "seq_idx")
WEIGHTS = "weight"  # in the names of numbers that classes have, one each, as labels number them
COLUMNS = 4  # up to which a matrix may have one that numbers samples, beside coordinates
POSITIONS = "position_ids"  # which begin anew with each of several sequences in a row


def packed_in(part: Any) -> Iterator[Any]:
    """What holds packed samples by its type, or by the names of its entries."""
    names = part if isinstance(part, Mapping) else ()
    named = any(str(name).startswith(ENDS) for name in names)
    if named or isinstance(part, PackedSequence) or (isinstance(part, Tensor) and part.is_nested):
        yield part
    elif not (is_list(part) and is_list_of_plain(part)):
        for entry in entries_of(part):
            yield from packed_in(entry)


def packed_rows_in(part: Any) -> Iterator[Any]:
    """Mappings of a single row whose positions fall, as those of one sequence never do."""
    if not isinstance(part, Mapping):
        for entry in entries_of(part):
            yield from packed_rows_in(entry)
        return
    positions = part.get(POSITIONS)
    if isinstance(positions, Tensor) and positions.ndim and (positions.diff() < 0).any():
        yield part


def named_weights_in(part: Any) -> Iterator[Any]:
    """What mappings name weights."""
    for name, entry in part.items() if isinstance(part, Mapping) else ():
        if WEIGHTS in str(name).lower():
            yield entry
    if not (is_list(part) and is_list_of_plain(part)):
        for entry in entries_of(part):
            yield from named_weights_in(entry)


def may_say_how_long(part: Any, rows: int) -> bool:
    """Whether a list of whole numbers may be the lengths of what stands in so many rows, or where each of it begins."""
    if not 0 < len(part) <= rows + 1 or not all(map(_is_whole, part)):
        return False
    numbers = [int(one) for one in part]
    if min(numbers) < 0 or max(numbers) > rows:
        return False
    return sum(numbers) == rows or (len(numbers) > 1 and (sum(numbers) < rows or numbers == sorted(numbers)))


def may_say_whose(part: Any, rows: int, samples: int, each: bool = False) -> bool:
    """Whether something may say to which of so many samples each row belongs, as where graphs or clouds are packed.

    Args:
        part: vectors, columns of narrow matrices, lists, and containers of them.
        rows: how many there are.
        samples: how many rows may belong to.
        each: whether only what names each of the samples counts.
    """
    if has_rows(part):
        columns = part.reshape(rows, -1).T if part.shape[:1] == (rows,) and _is_of_integers(part) else ()
        if len(columns) > COLUMNS:
            return False
        numbers = [one for one in columns if bool((one >= 0).all() and (one < samples).all())]
        return any(not each or len(set(one.tolist())) == samples for one in numbers)
    if is_list(part) and is_list_of_plain(part):
        inside = len(part) == rows and all(_is_whole(one) and 0 <= one < samples for one in part)
        return inside and (not each or len(set(part)) == samples)
    return any(may_say_whose(entry, rows, samples, each) for entry in entries_of(part))


def may_be_of_positions(part: Any) -> bool:
    """Whether rows may be positions, which all samples share: 0, 1, 2, …, or a mask that goes by their distance."""
    entries = torch.as_tensor(part)
    if entries.layout != torch.strided or len(entries) < 3 or entries.shape != entries.shape[:1] * entries.ndim:
        return False
    if entries.ndim == 1:
        return _is_of_integers(entries) and bool((entries == torch.arange(len(entries), device=entries.device)).all())
    if entries.ndim > 2:
        return False
    aside = torch.cat([entries[0, 1:], entries[1:, 0]])  # of the diagonal, where one-hot targets have ones
    return bool((aside != aside[0]).any() & (entries[1:, 1:] == entries[:-1, :-1]).all())


def _is_whole(one: Any) -> bool:
    if has_rows(one):
        return not one.ndim and _is_of_integers(one)
    return isinstance(one, Integral) and not isinstance(one, bool)


def _is_of_integers(part: Any) -> bool:
    if isinstance(part, Tensor):
        others = part.is_floating_point() or part.is_complex() or part.dtype == torch.bool
        return part.layout == torch.strided and not others
    return part.dtype.kind in "iu"
