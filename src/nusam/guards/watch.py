"""Whether tensors were written in the meantime: by what the host can see, and by norms where it may wait."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nusam.distributed.blocks import is_sharded

__all__ = ["Watch", "here", "is_here"]


PLAIN = (Tensor, nn.Parameter)
_VERSION = attrgetter("_version")


class Watch:
    """Sees which of some tensors are written from now on.

    The host sees version counters and addresses. A write in place through ``.data`` changes neither: so norms are
    compared too where asked for, on the device until the comparison is read.

    Args:
        tensors: what is watched.
        norms: whether to compare norms.
    """

    def __init__(self, tensors: Sequence[Tensor], norms: bool = False) -> None:
        self.tensors = tensors
        # FSDP2 moves shards about, and no forward writes to them
        self._plain = [tensor for tensor in tensors if type(tensor) in PLAIN]
        self._marks = self._read()
        # kept, so that no replacement can come to lie at the same address
        self._memory = list(map(Tensor.untyped_storage, self._plain))
        self._norms = _measure(tensors) if norms else []

    def stirred(self) -> list[Tensor]:
        """Those that the host saw written; their values may be what they were."""
        marks = self._read()
        if marks == self._marks:
            return []
        versions = [t for t, now, mark in zip(self.tensors, marks[0], self._marks[0], strict=True) if now != mark]
        moved = [t for t, now, mark in zip(self._plain, marks[1], self._marks[1], strict=True) if now != mark]
        return list(dict.fromkeys(versions + moved))

    def _read(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self.tensors)), list(map(Tensor.data_ptr, self._plain))

    def changed(self) -> list[Tensor]:
        """Those whose norms have changed. Waits for the device."""
        now = _measure(self.tensors)
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, norm in enumerate(now):
            kinds.setdefault((norm.device, norm.dtype), []).append(i)
        found: set[int] = set()
        for indices in kinds.values():
            before, after = torch.stack([self._norms[i] for i in indices]), torch.stack([now[i] for i in indices])
            differs = (before != after) & ~(before.isnan() & after.isnan())
            found.update(i for i, is_so in zip(indices, differs.tolist(), strict=True) if is_so)
        return [t for k, t in enumerate(self.tensors) if found & {2 * k, 2 * k + 1}]


@torch.no_grad()
def _measure(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each the absolute sum, which sees what is projected or rescaled, and the largest entry, which sees clamps."""
    return [
        torch.linalg.vector_norm(part, order, dtype=torch.float32 if part.dtype.itemsize < 4 else None)
        for part in map(_measurable, tensors)
        for order in (1, float("inf"))
    ]


def _measurable(tensor: Tensor) -> Tensor:
    part = here(tensor)
    return part.float() if part.dtype.itemsize == 1 or not (part.is_floating_point() or part.is_complex()) else part


def is_here(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own that can be read, and written entry by entry."""
    if type(tensor) not in PLAIN:
        return is_sharded(tensor) and is_here(here(tensor))
    if hasattr(tensor, "ds_id"):  # its entries come and go with an engine
        return False
    if is_lazy(tensor) or tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.numel() > 0 and not expanded


def here(tensor: Tensor) -> Tensor:
    """What this process holds of it, the very tensor; to be called without gradients."""
    if type(tensor) in PLAIN or not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part
