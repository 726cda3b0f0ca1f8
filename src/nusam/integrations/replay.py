"""The same batch and the same beginnings for every pass of a framework's training step.

A training step is a user's function that runs twice on one batch. It may take entries out of the batch, write into its
tensors, count its calls, gather losses in a list, or draw from an iterator; its second run would go on where the first
one ended. So every later pass begins with what the first one found, and in the end everything is as the first one left
it: that one was at the weights themselves, as is the loss that frameworks log.
"""

import copy
import dataclasses
import io
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nusam.model_guard import RandomState

__all__ = ["Replay"]

CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
LONG = 10_000  # entries above which a container is data, rather than what a step keeps
MANY = 1_000  # entries above which nobody looks into each of them
FEW = 32  # entries of a list up to which tensors are copied; a longer one is a record, whose tensors stay as they are
LARGE = 2**20  # entries above which a tensor is not copied
OF_MODULES = frozenset(vars(nn.Module()))  # parameters, buffers and hooks are the model's


class Replay:
    """The passes of one training step after the other.

    Args:
        step: what users call the training step.
    """

    def __init__(self, step: str) -> None:
        self.later = False
        """Whether the pass that runs is not the first one over its batch."""
        self._step = step
        self._clones = True  # until a step has been seen to leave its batch alone
        self._owners: list[object] = []
        self._after: _State | None = None  # what the first of several passes left
        self._kept: list[_Kept] | None = None  # while the first of several passes runs
        self._prepared: list[tuple[_Kept, RandomState | None]] = []
        self._asked_for: Iterator[tuple[_Kept, RandomState | None]] = iter(())

    def passes(self, passes: Iterator[str], owners: Sequence[object], batch: Any) -> Iterator[tuple[str, Any]]:
        """The name of every pass, and the batch for it.

        Args:
            passes: what :meth:`nusam.SharpnessAware.passes` gave.
            owners: whose attributes the training step may change.
            batch: as the framework hands it to the training step.

        Raises:
            RuntimeError: if the first pass changed what can't be brought back for the next.
        """
        before: _State | None = None
        kept: _Kept | None = None
        try:
            for name in passes:
                if before is not None and kept is not None:
                    before.restore()
                    self._asked_for = iter(self._prepared)
                    self.later = True
                    yield name, kept.again()
                elif name != "ascent":  # the only pass
                    yield name, batch
                else:
                    self._kept, self._prepared = [], []
                    kept = self._keep(batch)
                    self._owners = [*owners, *kept.objects]
                    before = _State(self._owners, draws=True)
                    yield name, batch
                    self._learn(before)
                    self._after = _State(self._owners)
        finally:
            after, self._after = self._after, None
            self._kept, self._prepared, self._owners, self.later = None, [], [], False
            if after is not None:
                after.restore()
            if before is not None:
                before.release()

    @contextmanager
    def for_good(self) -> Iterator[None]:
        """For what runs once a batch, though inside a later pass: it finds what the first pass left, and is kept."""
        if self._after is None:
            yield
            return
        self._after.restore()
        later, self.later = self.later, False
        try:
            yield
        finally:
            self.later = later
            self._after = _State(self._owners)

    def once(self, prepare: Callable[..., Any], model: nn.Module | None = None) -> Callable[..., Any]:
        """The function, called in the first pass alone; later ones get what it returned.

        Args:
            prepare: makes inputs of a batch.
            model: whose generators it may draw from; what is drawn after it is then the same in every pass.
        """

        def prepared(*args: Any, **options: Any) -> Any:
            if self.later:
                kept, random_state = next(self._asked_for, (None, None))
                if kept is None:
                    raise RuntimeError(
                        f"{self._step} prepared its inputs more often in the second pass over a batch than in the "
                        "first, so that the passes would differ; prepare them equally often."
                    )
                if random_state is not None:
                    random_state.replay()
                return kept.again()
            result = prepare(*args, **options)
            if self._kept is not None:
                self._prepared.append((self._keep(result), None if model is None else RandomState(model.parameters())))
            return result

        return prepared

    def _keep(self, batch: Any) -> "_Kept":
        kept = _Kept(batch, self._clones)
        if kept.has_graph:
            raise RuntimeError(
                f"{self._step} was given a batch that carries a graph of its own, backward through which only one of "
                f"two passes can go; compute that part in {self._step}."
            )
        if self._kept is not None:
            self._kept.append(kept)
        return kept

    def _learn(self, before: "_State") -> None:
        changed = any(kept.changed for kept in self._kept or ())
        if changed and not self._clones:
            self._clones = True
            raise RuntimeError(
                f"{self._step} wrote into a tensor of its batch, which it had not done before, so that no copy is "
                "there for the second pass; write into a clone of it, or do so from the first perturbed step on."
            )
        self._clones = changed
        self._kept = None
        name = before.lost()
        if name is not None:
            raise RuntimeError(
                f"{self._step} changes {name} in a way that can't be taken back before the second pass, where it would "
                "change again; make it a buffer of the model, or change it after the step."
            )


class _Kept:
    """A batch as it was before a pass had it."""

    def __init__(self, batch: Any, clones: bool) -> None:
        self.has_graph = False
        self.objects: list[object] = []  # whose attributes are looked after as those of owners are
        self._clones = clones
        self._versions: list[tuple[Tensor, int]] = []
        self._batch = self._own(batch, {}, self._look_at)

    @property
    def changed(self) -> bool:
        """Whether a tensor was written into."""
        return any(tensor._version != version for tensor, version in self._versions)

    def again(self) -> Any:
        """The batch, in containers and tensors that are this pass's own."""
        return self._own(self._batch, {}, lambda tensor: None)

    def _look_at(self, tensor: Tensor) -> None:
        self.has_graph |= tensor.grad_fn is not None
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))

    def _own(self, part: Any, made: dict[int, Tensor], look_at: Callable[[Tensor], None]) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in made:  # one that is there twice stays one
                look_at(part)
                made[id(part)] = self._own_tensor(part)
            return made[id(part)]
        own = partial(self._own, made=made, look_at=look_at)
        if isinstance(part, MutableMapping):
            fresh: Any = copy.copy(part)
            for name, value in part.items():
                fresh[name] = own(value)
            return fresh
        if isinstance(part, tuple) and hasattr(part, "_make"):
            return part._make(map(own, part))
        if type(part) in (list, tuple):
            return type(part)(map(own, part))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            fresh = copy.copy(part)
            for field in dataclasses.fields(part):
                object.__setattr__(fresh, field.name, own(getattr(part, field.name)))
            return fresh
        if hasattr(type(part), "__copy__"):
            return copy.copy(part)
        if hasattr(part, "__dict__") and not callable(part):
            self.objects.append(part)
        return part

    def _own_tensor(self, tensor: Tensor) -> Tensor:
        if self._clones:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        # a gradient of the inputs stays with the pass that took it
        return tensor.detach().requires_grad_(tensor.requires_grad) if type(tensor) is Tensor else tensor


class _State:
    """What objects keep in their attributes: what these are bound to, and what is in containers and tensors.

    ``draws``: whether iterators are to give what they gave once more after :meth:`restore`.
    """

    def __init__(self, owners: Sequence[object], draws: bool = False) -> None:
        self._bound: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._undo: list[Callable[[], None]] = []
        self._out_of_reach: list[tuple[str, Callable[[], bool]]] = []
        seen: set[int] = set()
        for owner in owners:
            own = vars(owner)
            if draws:
                own.update({name: _Drawn(value) for name, value in own.items() if _can_be_drawn_from(value)})
            bound = {name: value for name, value in own.items() if name not in OF_MODULES}
            self._bound.append((own, bound))
            for name, value in bound.items():
                self._remember(f"{type(owner).__name__}.{name}", value, seen)

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

    def _remember(self, name: str, value: Any, seen: set[int], copied: bool = True) -> None:
        kind = type(value)
        if kind in (int, float, bool, str, type(None)) or id(value) in seen:
            return
        if isinstance(value, Tensor):
            self._remember_tensor(name, value, copied)
        elif kind in CONTAINERS:
            seen.add(id(value))
            if len(value) > LONG:
                length = len(value)
                self._out_of_reach.append((name, lambda: len(value) != length))
                return
            self._undo.append(partial(_refill, value, copy.copy(value)))
            inside = value.values() if isinstance(value, dict) else value
            for inner in inside if len(value) <= MANY else ():
                self._remember(name, inner, seen, copied=isinstance(value, dict) or len(value) <= FEW)
        elif isinstance(value, _Drawn):
            self._undo.append(value.rewind)
        else:
            undo = _generator(value)
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
        self._items: list[_Kept | None] = []  # None where it ended
        self._next = 0

    def __next__(self) -> Any:
        self._next += 1
        if self._next > len(self._items):
            try:
                item = next(self.source)
            except StopIteration:
                self._items.append(None)
                raise
            self._items.append(_Kept(item, clones=True))
            return item
        kept = self._items[self._next - 1]
        if kept is None:
            raise StopIteration
        return kept.again()

    def rewind(self) -> None:
        self._next = 0

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)


def _can_be_drawn_from(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, (io.IOBase, _Drawn))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(contents)
    else:
        container.update(contents)


def _generator(value: Any) -> Callable[[], None] | None:
    """What sets a random generator back to where it is."""
    if isinstance(value, torch.Generator):
        return partial(_set_state, value, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)
