"""Counts what processes say to each other, call by call."""

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """A collective, and the bytes of the tensor that is whole afterwards, or was before."""

    name: str
    bytes: int


class Collectives(TorchDispatchMode):
    """The collectives that run inside, of eager code and of the distributed engines."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            name = func.__name__.split(".")[0].replace("_", "")
            self.calls.append(Call(name, max(sizes) if "gather" in name or "scatter" in name else sum(sizes)))
        return func(*args, **(kwargs or {}))

    def count(self, name: str = "") -> int:
        """How many have ``name`` in their name."""
        return sum(name in call.name for call in self.calls)

    def bytes(self, name: str = "") -> int:
        """What they moved together."""
        return sum(call.bytes for call in self.calls if name in call.name)
