"""The buffers of a model move once a step, though two passes run.

Batch statistics, codebooks, queues, vectors of spectral norms, observers, counters: whatever a forward keeps for the
next one. Both passes start from the same buffers, as they draw the same random numbers, and what stays is the
ascent's: the buffers of one forward at the unperturbed weights.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nusam.guards.watch import Watch, here, is_here
from nusam.interrupts import always
from nusam.layers.module_tree import ModuleTree, same

__all__ = ["Buffers"]

SMALL = 2**16  # entries up to which a buffer is copied in every step, whether it was seen to move or not


class Buffers:
    """What a model remembers from one forward to the next, replayed in the second of two passes.

    Large buffers that never move (masks, tables of angles) are not copied in every step, but those that were seen to
    move: by the host in any step, by their values where everything is looked at, after both passes: a copy of a network
    that follows it moves in the descent alone as long as it is equal. Frozen parameters are held to the same, since a
    forward may write such a copy; of large ones that are none, norms are compared, not values.

    Numbers that are attributes of a module with buffers (a position in a queue, whether a codebook was begun) follow
    its buffers.
    """

    def __init__(self, tree: ModuleTree) -> None:
        self._tree = tree
        self._moving: set[Tensor] = set()  # of large buffers and frozen parameters
        self._deaf: set[Tensor] = set()  # written without a change, as where DDP broadcasts buffers
        self._step: _Step | None = None
        self._last: _Step | None = None  # of the descent that runs or has just run
        self._plan: _Plan | None = None
        self._frozen: set[Tensor] = set()  # parameters that have been looked at as such
        self._told: set[str] = set()  # names of what moved unseen
        self._find()

    def _find(self) -> None:
        self._walk = self._tree.walks
        self._sizes = list(map(len, self._tree.buffers))
        self._owners = [module for module in self._tree.modules if module._buffers]
        parameters = dict.fromkeys(self._tree.parameters())
        self._parameters = [p for p in parameters if type(p) is nn.Parameter and is_here(p)]

    def before_ascent(self, everything: bool) -> None:
        """Remember the buffers as they are; ``everything``: the large ones too, which waits for the device."""
        self._tree.refresh()
        if everything or self._walk != self._tree.walks or self._sizes != list(map(len, self._tree.buffers)):
            self._find()
        frozen = [parameter for parameter in self._parameters if not parameter.requires_grad]
        if not self._frozen.issuperset(frozen):
            self._frozen.update(frozen)
            everything = True
        moving = [parameter for parameter in frozen if parameter in self._moving] if self._moving else []
        if self._plan is None or not self._plan.fits(self._owners, moving):
            self._moving.intersection_update([*_entries(self._owners), *self._parameters])
            self._plan = _Plan(self._owners, moving, self._moving)
        still = [parameter for parameter in frozen if parameter not in self._moving] if moving else frozen
        self._last = None
        self._step = _Step(self._plan, still, self._twins(still) if everything else {}, everything)

    def _twins(self, still: Sequence[Tensor]) -> dict[Tensor, bool]:
        """What is copied: small ones, and those that are equal to what is trained so far, which is told of each."""
        shapes = {parameter.shape for parameter in still}
        trained = {_beginning(p) for p in self._parameters if p.requires_grad and p.shape in shapes}
        shapes = {shape for shape, *_ in trained}
        twins = {p: p.shape in shapes and _beginning(p) in trained for p in still}
        return {parameter: equal for parameter, equal in twins.items() if equal or parameter.numel() <= SMALL}

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Inside, the buffers start from where the ascent started; afterwards they are those that it left."""
        step = self._completed()
        if step is None:
            yield
            return

        def finish() -> None:
            step.finish()
            if step.moved_late:
                self._moving |= step.moved_late
                self._plan = None

        with always(finish):
            step.rewind()
            yield
        self._tell(step.lost)

    def rewind(self) -> None:
        """Go back to where the ascent started, which is to be run again."""
        step = self._completed()
        if step is not None:
            step.rewind()

    def start_over(self) -> None:
        """Go back to where the last step's ascent started, after its descent."""
        if self._last is not None:
            self._last.rewind()
        self._last = None

    def _tell(self, lost: set[Tensor]) -> None:
        """Warn once of what the descent could not start from where the ascent did."""
        model = self._tree.model
        named = [*model.named_parameters(), *model.named_buffers()] if lost else []
        names = [name for name, tensor in named if tensor in lost and name not in self._told]
        self._told.update(names)
        if names:
            warnings.warn(
                f"The model writes {', '.join(names)} in its own forward, which was not seen at first, so that this "
                "step's two passes wrote it one after the other; from now on a copy keeps it.",
                stacklevel=2,
            )

    def _completed(self) -> "_Step | None":
        """The step whose ascent is over, with what that left."""
        step, self._step = self._step, None
        self._last = step
        if step is None:
            return None
        moved = step.moved(self._deaf)
        if moved:
            self._moving |= moved
            self._plan = None
        newcomers = []
        if self._sizes != list(map(len, self._tree.buffers)):
            known = set(self._owners)
            newcomers = [module for module in self._tree.modules if module._buffers and module not in known]
        step.remember(moved, newcomers)
        return step


class _Plan:
    """Which tensors are copied, and where to; holds from step to step while none is replaced or reshaped."""

    @torch.no_grad()
    def __init__(self, owners: Sequence[nn.Module], frozen: Sequence[Tensor], moving: set[Tensor]) -> None:
        self.owners = list(owners)
        self.frozen = list(frozen)
        self.entries = _entries(owners)
        self.buffers = [dict(owner._buffers) for owner in owners]
        buffers = [t for t in dict.fromkeys(self.entries) if t is not None and is_here(t)]
        self.large = [t for t in buffers if t.numel() > SMALL and t not in moving]
        copied = [t for t in buffers if t.numel() <= SMALL or t in moving]
        self.tensors = [here(t) for t in copied + self.frozen]
        self.before = [torch.empty_like(t) for t in self.tensors]
        self.after = [torch.empty_like(t) for t in self.tensors]
        self.shapes = [t.shape for t in self.tensors]
        self.with_numbers = [owner for owner in owners if _has_own_forward(owner)]
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, t in enumerate(self.tensors):
            kinds.setdefault((t.device, t.dtype), []).append(i)
        self._kinds = list(kinds.values())  # one kernel copies many tensors of a kind

    def fits(self, owners: Sequence[nn.Module], frozen: Sequence[Tensor]) -> bool:
        """Whether all is where it was when the plan was made."""
        return same(owners, self.owners) and same(frozen, self.frozen) and self.holds() and not self.resized()

    def holds(self) -> bool:
        """Whether no buffer was replaced, brought or taken away."""
        return same(_entries(self.owners), self.entries)

    def resized(self) -> list[tuple[int, Tensor]]:
        return [(i, t) for i, (t, shape) in enumerate(zip(self.tensors, self.shapes, strict=True)) if t.shape != shape]

    @torch.no_grad()
    def copy(self, into: list[Tensor], values: list[Tensor], without: dict[int, Tensor]) -> None:
        for kind in self._kinds:
            chosen = [i for i in kind if i not in without]
            if chosen:
                torch._foreach_copy_([into[i] for i in chosen], [values[i] for i in chosen])


class _Late(NamedTuple):
    """A tensor that came to light in this step: a large one that moved, or a buffer that was not there before."""

    tensor: Tensor
    before: Tensor | None  # lost, where no copy was made
    after: Tensor


class _Step:
    """The buffers of one step: before the ascent, and after it."""

    @torch.no_grad()
    def __init__(self, plan: _Plan, still: Sequence[Tensor], twins: dict[Tensor, bool], everything: bool) -> None:
        self._plan = plan
        self._everything = everything
        self._finished = False
        self._numbers_before = [_numbers(owner) for owner in plan.with_numbers]
        self._large = Watch(plan.large)
        self._still = Watch(still, norms=everything)
        self._copies = {t: here(t).clone() for t in (*plan.large, *twins)} if everything else {}
        self._equal = {twin for twin, equal in twins.items() if equal}
        self.moved_late: set[Tensor] = set()  # in the descent alone, or soon with what did
        self.lost: set[Tensor] = set()  # what moved without a copy of what it was
        plan.copy(plan.before, plan.tensors, {})

    @torch.no_grad()
    def moved(self, deaf: set[Tensor]) -> set[Tensor]:
        """Large tensors that the ascent moved. ``deaf``: those whose version says nothing; brought up to date."""
        stirred = {*self._large.stirred(), *self._still.stirred()}
        if not self._everything:
            self.lost = stirred - deaf
            return stirred - deaf
        unequal = {t for t, copy in self._copies.items() if not _equal(here(t), copy)}
        moved = unequal.union(self._still.changed())
        self.lost = moved - self._copies.keys()
        written = set(self._still.stirred())  # a copy may move by less than its precision, this time
        deaf |= stirred - moved - written
        return moved | written

    @torch.no_grad()
    def remember(self, moved: set[Tensor], newcomers: Sequence[nn.Module]) -> None:
        """Keep what the ascent left; nothing of the model is written.

        ``newcomers``: modules that had no buffer before. A buffer that the ascent brought can't be taken away again,
        since its module may know of it; the descent starts from it as it is.
        """
        plan = self._plan
        before = set(plan.entries)
        owners = [*plan.owners, *newcomers] if newcomers or not plan.holds() else []
        self._after = [(owner, dict(owner._buffers)) for owner in owners]
        new = [t for _, after in self._after for t in after.values() if t is not None and t not in before]
        self._late = [_Late(here(t), self._copies.get(t), here(t).clone()) for t in moved]
        self._late += [_Late(here(t), None, here(t).clone()) for t in new if is_here(t)]
        self._copies = {t: copy for t, copy in self._copies.items() if t not in moved}
        self._moved = moved
        self._resized = {i: t.data for i, t in plan.resized()}
        plan.copy(plan.after, plan.tensors, self._resized)
        self._numbers_after = [_numbers(owner) for owner in plan.with_numbers]

    def rewind(self) -> None:
        """Make the buffers what they were before the ascent."""
        plan = self._plan
        for (owner, after), before in zip(self._after, plan.buffers, strict=False):
            _fill(owner, {**before, **{name: t for name, t in after.items() if name not in before}})
        for owner, numbers in zip(plan.with_numbers, self._numbers_before, strict=True):
            _set(owner, numbers)
        for i in self._resized:
            plan.tensors[i].data = plan.before[i]
        plan.copy(plan.tensors, plan.before, self._resized)
        for late in self._late:
            if late.before is not None:
                _put(late.tensor, late.before)

    def finish(self) -> None:
        """Make the buffers what the ascent left; bears repetition."""
        if self._finished:
            return
        plan = self._plan
        if self._after or not plan.holds():
            for owner, after in self._after or zip(plan.owners, plan.buffers, strict=True):
                _fill(owner, after)
        for owner, numbers in zip(plan.with_numbers, self._numbers_after, strict=True):
            _set(owner, numbers)
        for i, resized in self._resized.items():
            plan.tensors[i].data = resized
        for i, t in plan.resized():
            if i not in self._resized:
                t.data = plan.after[i].clone()
        plan.copy(plan.tensors, plan.after, self._resized)
        for late in self._late:
            _put(late.tensor, late.after)
        if self._everything:
            self._look_again()
        self._finished = True

    @torch.no_grad()
    def _look_again(self) -> None:
        """Put back what the ascent left alone and the descent moved unseen: at x + ε it found something to follow.

        A frozen parameter that the descent writes in sight, by its version, is written there for the first time, as one
        whose layer the ascent did not call, and keeps that.
        """
        stirred = set(self._still.stirred())  # an ε that was there has left a version, too
        for tensor, copy in self._copies.items():
            if tensor not in stirred and not _equal(here(tensor), copy):
                self.moved_late.add(tensor)
                _put(here(tensor), copy)
        seen = {*self._moved, *self._copies, *stirred}
        self.lost |= set(self._still.changed()) - seen
        self.moved_late |= self.lost
        if not self._equal.isdisjoint(self._moved | self.moved_late):
            self.moved_late |= self._equal  # a network's copy moves as one, where its weights do
        self._copies = {}


def _entries(owners: Sequence[nn.Module]) -> list[Tensor | None]:
    return [buffer for owner in owners for buffer in owner._buffers.values()]


def _fill(owner: nn.Module, buffers: dict[str, Any]) -> None:
    """Put the tensors themselves in place, in the order that they had."""
    now = owner._buffers
    if list(now) != list(buffers):
        now.clear()
        now.update(buffers)
        return
    for name, buffer in buffers.items():
        if now[name] is not buffer:
            now[name] = buffer


@torch.no_grad()
def _put(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape:
        tensor.copy_(value)
    else:
        tensor.data = value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _beginning(parameter: Tensor) -> tuple[Any, ...]:
    """By which parameters that are equal are known to be, most likely."""
    return parameter.shape, parameter.dtype, *parameter.detach().reshape(-1)[:8].tolist()


def _has_own_forward(module: nn.Module) -> bool:
    """Whether code outside torch may keep numbers in it: torch's own layers keep what moves in buffers."""
    return any(not kind.__module__.startswith(("torch.", "builtins")) for kind in type(module).__mro__)


def _set(module: nn.Module, numbers: dict[str, Any]) -> None:
    if _numbers(module) != numbers:  # a compiled graph may be guarded by them
        module.__dict__.update(numbers)


def _numbers(module: nn.Module) -> dict[str, Any]:
    items = module.__dict__.items()
    return {name: value for name, value in items if type(value) in (bool, int, float) and name != "training"}
