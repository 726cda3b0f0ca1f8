"""Parameters that are others in the same memory, as ``decoder.weight.data = encoder.weight.data`` leaves them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["with_shared_memory"]


def with_shared_memory(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Each of torch's plain parameters that holds entries of another one, and that one.

    Parts of one piece of memory that have no entry in common, as engines lay out parameters, share nothing.
    """
    found: dict[Tensor, Tensor] = {}
    near: list[Tensor] = []  # those that may reach as far as the next one
    for parameter in sorted(filter(_lies_still, dict.fromkeys(parameters)), key=_begin):
        near = [other for other in near if _end(other) > _begin(parameter)]
        for other in near:
            if _meet(parameter, other):
                found.setdefault(parameter, other)
                found.setdefault(other, parameter)
        near.append(parameter)
    return found


def _lies_still(parameter: Tensor) -> bool:
    if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):  # an engine moves its own about
        return False
    return (
        parameter.layout is torch.strided
        and not parameter.is_meta
        and parameter.numel() > 0
        and parameter.data_ptr() != 0
    )


def _begin(parameter: Tensor) -> tuple[str, int]:
    return str(parameter.device), parameter.data_ptr()


def _end(parameter: Tensor) -> tuple[str, int]:
    return str(parameter.device), parameter.data_ptr() + _span(parameter) * parameter.element_size()


def _span(parameter: Tensor) -> int:
    """Entries from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two that lie within one stretch of memory have an entry in common; rows and columns of one may not."""
    first, second = sorted((a, b), key=_begin)
    if first.element_size() != second.element_size():
        return True
    offset = (second.data_ptr() - first.data_ptr()) // first.element_size()
    taken = torch.zeros(max(_span(first), offset + _span(second)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), offset).any())
