"""Batches whose samples stand in one sequence, one behind the other, so that rows are no samples."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nusam.containers import entries_of, has_rows, is_list, is_list_of_plain

__all__ = ["is_packed", "is_packed_row", "may_say_how_long", "may_say_whose"]

# what begins the names of entries that say where packed sequences end
ENDS = ("cu_seq_lens", "cu_seqlens", "seq_idx")
POSITIONS = "position_ids"  # which begin anew with each of several sequences in a row


def is_packed(part: Any) -> bool:
    """Whether it holds packed samples by its type, or by the names of its entries."""
    names = part if isinstance(part, Mapping) else ()
    packed = isinstance(part, PackedSequence) or any(str(name).startswith(ENDS) for name in names)
    return packed or (isinstance(part, Tensor) and part.is_nested)


def is_packed_row(part: Mapping[Any, Any]) -> bool:
    """Whether positions of a single row tell (those of one sequence never fall)."""
    positions = part.get(POSITIONS)
    return isinstance(positions, Tensor) and positions.ndim > 0 and bool((positions.diff() < 0).any())


def may_say_how_long(part: Any, rows: int) -> bool:
    """Whether a list of whole numbers may be the lengths of what stands in so many rows, or where each of it begins."""
    if not 0 < len(part) <= rows + 1 or not all(map(_is_whole, part)):
        return False
    numbers = [int(one) for one in part]
    if min(numbers) < 0 or max(numbers) > rows:
        return False
    return sum(numbers) == rows or (len(numbers) > 1 and (sum(numbers) < rows or numbers == sorted(numbers)))


def may_say_whose(part: Any, rows: int, samples: int) -> bool:
    """Whether something may say to which of so many samples each row belongs, as where graphs or clouds are packed."""
    if has_rows(part):
        is_one_a_row = part.shape[:1] == (rows,) and part.shape.count(1) == part.ndim - 1 and _is_of_integers(part)
        return is_one_a_row and bool((part >= 0).all() and (part < samples).all())
    if is_list(part) and is_list_of_plain(part):
        return len(part) == rows and all(_is_whole(one) and 0 <= one < samples for one in part)
    return any(may_say_whose(entry, rows, samples) for entry in entries_of(part))


def _is_whole(one: Any) -> bool:
    if has_rows(one):
        return not one.ndim and _is_of_integers(one)
    return isinstance(one, Integral) and not isinstance(one, bool)


def _is_of_integers(part: Any) -> bool:
    if isinstance(part, Tensor):
        return not (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool)
    return part.dtype.kind in "iu"
