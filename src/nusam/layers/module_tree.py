"""The modules of a model, walked once and again only where the model has changed."""

import operator
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import nn

__all__ = ["ModuleTree", "is_compiled", "outside_of_graphs", "same"]

_VALUES = operator.methodcaller("values")


class ModuleTree:
    """All modules of a model as a flat list; ``walks`` counts how often it was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.walks = 0
        self._find()

    def _find(self) -> None:
        self.walks += 1
        self.modules = list(self.model.modules())
        self.buffers = [module._buffers for module in self.modules]
        self._families = [module._modules for module in self.modules]
        self._children = self._read()

    def _read(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(_VALUES, filter(None, self._families))))

    def refresh(self) -> None:
        """Walk the model again if any module in it gained, lost or replaced a child."""
        if not same(self._read(), self._children):
            self._find()

    def parameters(self) -> list[nn.Parameter]:
        """Those that stand in the modules now, some perhaps twice."""
        return [p for module in self.modules for p in module._parameters.values() if p is not None]


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether both hold the same objects, in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is one of torch.compile, or has been compiled in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def outside_of_graphs(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that Python calls; what is compiled is one module."""
    yield module
    if not is_compiled(module):
        for child in module.children():
            yield from outside_of_graphs(child)
