"""Whether tensors were written in the meantime: by what the host can see, and by norms where it may wait."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nusam.sharding import is_sharded

__all__ = ["Watch", "here", "is_here"]


MEASURED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        with torch.no_grad():
            # an alias keeps the memory, so that no replacement can come to lie at the same address
            self._aliases = [here(tensor).detach() for tensor in tensors]
            self._versions = [alias._version for alias in self._aliases]
            self._measured = [i for i, alias in enumerate(self._aliases) if alias.dtype in MEASURED]
            self._norms = self._measure() if norms else []

    def stirred(self) -> list[Tensor]:
        """Those that the host saw written; their values may be what they were."""
        with torch.no_grad():
            now = [here(tensor) for tensor in self.tensors]
        return [
            tensor
            for tensor, version, alias, current in zip(self.tensors, self._versions, self._aliases, now, strict=True)
            if current._version != version or current.data_ptr() != alias.data_ptr()
        ]

    def changed(self) -> list[Tensor]:
        """Those whose norms have changed. Waits for the device."""
        with torch.no_grad():
            now = self._measure()
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, norm in enumerate(now):
            kinds.setdefault((norm.device, norm.dtype), []).append(i)
        found: set[int] = set()
        for indices in kinds.values():
            before, after = torch.stack([self._norms[i] for i in indices]), torch.stack([now[i] for i in indices])
            differs = (before != after) & ~(before.isnan() & after.isnan())
            found.update(i for i, is_so in zip(indices, differs.tolist(), strict=True) if is_so)
        return [self.tensors[k] for j, k in enumerate(self._measured) if found & {2 * j, 2 * j + 1}]

    def _measure(self) -> list[Tensor]:
        """Of each tensor the absolute sum, which sees what is projected or rescaled, and the largest entry: clamped."""
        values = [here(self.tensors[i]) for i in self._measured]
        wide = [torch.float32 if value.dtype.itemsize < 4 else None for value in values]
        return [
            torch.linalg.vector_norm(value, order, dtype=dtype)
            for value, dtype in zip(values, wide, strict=True)
            for order in (1, float("inf"))
        ]


def is_here(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own that can be read, and written entry by entry."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return is_sharded(tensor) and is_here(here(tensor))
    if is_lazy(tensor) or tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.numel() > 0 and not expanded


def here(tensor: Tensor) -> Tensor:
    """What this process holds of it, the very tensor; to be called without gradients."""
    if type(tensor) in (Tensor, nn.Parameter) or not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part
