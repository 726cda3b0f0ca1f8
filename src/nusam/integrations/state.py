"""What a training step keeps in the object whose method it is, as it was at some time."""

import copy
import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from nusam.guards.taking_back import is_an_array, refill, undo_of
from nusam.integrations.batches import Kept

__all__ = ["State"]

CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
LONG = 10_000  # entries above which a container is data, rather than what a step keeps
MANY = 1_000  # entries above which nobody looks into each of them
FEW = 32  # entries of a list up to which tensors are copied; a longer one is a record, whose tensors stay as they are
LARGE = 2**20  # entries above which a tensor is not copied
OF_MODULES = frozenset(vars(nn.Module()))  # parameters, buffers and hooks are the model's
FRAMEWORKS = {
    "accelerate",
    "builtins",
    "lightning",
    "nusam",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
    "transformers",
}
CONCURRENT = {"_thread", "asyncio", "concurrent", "multiprocessing", "queue", "threading"}


class State:
    """What objects keep in their attributes: what these are bound to, and what is in containers, tensors and arrays.

    Other objects that they keep are looked into if their classes come from the same packages, as a user's own meter
    does beside the user's own module.

    ``draws``: whether iterators are to give what they gave once more after :meth:`restore`.
    """

    def __init__(self, owners: Sequence[object], draws: bool = False) -> None:
        self._draws = draws
        self._bound: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._undo: list[Callable[[], None]] = []
        self._out_of_reach: list[tuple[str, Callable[[], bool]]] = []
        self._seen = {id(owner) for owner in owners}
        self._homes = {_home(kind) for owner in owners for kind in type(owner).__mro__} - FRAMEWORKS
        for owner in owners:
            self._remember_attributes(owner)

    def lost(self) -> str | None:
        """The name of something that has changed and was not copied, being too large or one of many."""
        return next((name for name, has_changed in self._out_of_reach if has_changed()), None)

    def restore(self) -> None:
        for own, bound in self._bound:
            for name in own.keys() - bound.keys() - OF_MODULES:
                del own[name]
            own.update(bound)
        for undo in self._undo:
            undo()

    def release(self) -> None:
        """Bind the attributes to the iterators themselves again."""
        for own, _ in self._bound:
            own.update({name: value.source for name, value in own.items() if isinstance(value, _Drawn)})

    def _remember_attributes(self, owner: object) -> None:
        own = vars(owner)
        if self._draws:
            own.update({name: _Drawn(value) for name, value in own.items() if _can_be_drawn_from(value)})
        bound = {name: value for name, value in own.items() if name not in OF_MODULES}
        self._bound.append((own, bound))
        for name, value in bound.items():
            self._remember(f"{type(owner).__name__}.{name}", value)

    def _remember(self, name: str, value: Any, copied: bool = True) -> None:
        kind = type(value)
        if kind in (int, float, bool, str, type(None)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._remember_tensor(name, value, copied)
        elif kind in CONTAINERS:
            if len(value) > LONG:
                length = len(value)
                self._out_of_reach.append((name, lambda: len(value) != length))
                return
            self._undo.append(partial(refill, value, copy.copy(value)))
            inside = value.values() if isinstance(value, dict) else value
            for inner in inside if len(value) <= MANY else ():
                self._remember(name, inner, copied and (isinstance(value, dict) or len(value) <= FEW))
        elif isinstance(value, _Drawn):
            self._undo.append(partial(value.go_to, value.position))
        elif _home(kind) in self._homes and _is_plain(value):
            self._remember_attributes(value)
        elif not (is_an_array(value) and value.size > LARGE):
            undo = undo_of(value)
            if undo is not None:
                self._undo.append(undo)

    def _remember_tensor(self, name: str, value: Tensor, copied: bool) -> None:
        if value.requires_grad or value.is_inference():
            return
        version = value._version
        if not copied or value.numel() > LARGE:
            self._out_of_reach.append((name, lambda: value._version != version))
            return
        before = value.clone()

        def undo() -> None:
            if value._version != version:
                with torch.no_grad():
                    value.copy_(before)

        self._undo.append(undo)


class _Drawn(Iterator[Any]):
    """An iterator whose items can be had once more."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._items: list[Kept | None] = []  # None where it ended
        self.position = 0

    def __next__(self) -> Any:
        self.position += 1
        if self.position > len(self._items):
            try:
                item = next(self.source)
            except StopIteration:
                self._items.append(None)
                raise
            self._items.append(Kept(item, clones=True))
            return item
        kept = self._items[self.position - 1]
        if kept is None:
            raise StopIteration
        return kept.again()

    def go_to(self, position: int) -> None:
        self.position = position

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)


def _can_be_drawn_from(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, (io.IOBase, _Drawn))


def _home(kind: type) -> str:
    """The package, or script, that a class is from."""
    return kind.__module__.partition(".")[0]


def _is_plain(value: Any) -> bool:
    """Whether nobody but the step changes its attributes: no module, no data, nothing that has threads."""
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, (nn.Module, Optimizer, Dataset, type)):
        return False
    return not any(_home(type(inner)) in CONCURRENT for inner in vars(value).values())
