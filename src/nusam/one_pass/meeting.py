"""Whether samples that travel together meet where no gradient passes: in a number that the model takes of all of them.

Each side is computed once more without the other one. Where the model draws, what it gives samples alone tells nothing,
since it draws otherwise for another number of them. So it is looked at where every draw has one and the same value, and
with others behind: in shapes that are the same they leave every draw where it was.
"""

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nusam.batch import first_samples, samples_in
from nusam.guards.model_guard import RandomState
from nusam.interrupts import always
from nusam.one_pass.joint import CannotJoin, Joint, leaves, part_of
from nusam.one_pass.neighbours import Neighbours

__all__ = ["Found", "Meeting"]

VALUES = (0.01, 0.99)  # of all draws, so that what happens with some probability happens, and what it leaves does
TRIALS = 4  # with others behind, of a model that draws

Function = Callable[[Any], Tensor]


class Found(NamedTuple):
    """What one run came to: the outputs of the joined modules, if they were noted, and the losses."""

    outputs: list[Any]
    losses: tuple[Tensor, ...]


class Meeting:
    """Looks whether samples meet.

    Args:
        joint: runs both sides.
        loss: of one side.
        random_state: the generators as they are.
    """

    def __init__(self, joint: Joint, loss: Function, random_state: Callable[[], RandomState]) -> None:
        self._joint, self._loss, self._random_state = joint, loss, random_state
        self._before = random_state()

    def found(self, both: Neighbours, together: Found, always_all: bool) -> bool:
        """Whether samples are given something else where others travel with them.

        Args:
            both: the samples of either side.
            together: what they came to, with outputs.
            always_all: whether to run as often in any case, as other processes must.
        """
        batch, following, ahead = both
        draws = not self._before.is_that_of(self._random_state())
        count = samples_in(ahead) / samples_in(batch)
        behind = Neighbours.of(batch, batch, min(1.0, count)).ahead
        before = first_samples(following, min(1.0, samples_in(batch) / samples_in(following)))
        if samples_in(behind) != samples_in(ahead):
            behind = ahead
        if samples_in(before) != samples_in(batch):
            before = batch
        meet = not draws and self._meets_alone(batch, ahead, together)
        if not (draws or always_all):
            return meet
        for value in VALUES:
            meet |= self._meets_undrawn(batch, ahead, value)
        for trial in range(TRIALS):
            if trial:
                together = self.together(batch, ahead)
            meet |= self._meets_others(batch, ahead, together, before, behind)
            self._before = self._random_state()  # the next trial draws otherwise
        return meet

    def _meets_alone(self, batch: Any, ahead: Any, together: Found) -> bool:
        """Whether a side by itself comes to something else, but for rounding."""
        for number, (side, part) in enumerate((("first", batch), ("second", ahead))):
            alone = self.by_itself(part, side)
            mine = part_of(together.outputs, self._joint.rows, side == "second")
            if not _are_alike(mine, alone.outputs, _rounding):
                return True
            # an autocast inside of the loss shows in the outputs
            tolerance = max(map(_rounding, [*leaves(mine), *alone.losses]))
            is_another = not _is_close(together.losses[number], alone.losses[0], tolerance)
            if is_another and self._repeats(batch, ahead, together, number):
                return True
        return False

    def _repeats(self, batch: Any, ahead: Any, together: Found, number: int) -> bool:
        """Whether the loss of a side comes to the same again: it may count its calls."""
        again = self.together(batch, ahead)
        return _are_alike([together.losses[number]], [again.losses[number]], _same)

    def _meets_undrawn(self, batch: Any, ahead: Any, value: float) -> bool:
        """The same where every draw is ``value``; nothing where the model can't compute with that."""
        loss = self._loss

        def undrawn(part: Any) -> Tensor:
            with _Undrawn(value):
                return loss(part)

        self._loss = undrawn
        self._before.replay()
        before = _drawn_beside_torch()
        try:
            meets = self._meets_alone(batch, ahead, self.together(batch, ahead))
            return meets and _drawn_beside_torch() == before
        except CannotJoin:
            raise
        except Exception:
            return False
        finally:
            self._loss = loss

    def _meets_others(self, batch: Any, ahead: Any, together: Found, before: Any, behind: Any) -> bool:
        """Whether a side comes to something else with others on the other side, in the same shapes and draws."""
        joint = self._joint
        others = (self.together(batch, behind), self.together(before, ahead))
        repeat = [self._repeats(batch, ahead, together, number) for number in (0, 1)]
        for number, other in enumerate(others):
            mine, theirs = (part_of(found.outputs, joint.rows, number == 1) for found in (together, other))
            if not _are_alike(mine, theirs, _same):
                return True
            loss, another = [together.losses[number]], [other.losses[number]]
            if repeat[number] and not _are_alike(loss, another, _same):
                return True
        return False

    def together(self, first: Any, second: Any, notes: bool = True) -> Found:
        """Run both sides, from the generators as they were."""
        self._before.replay()
        nowhere: AbstractContextManager[list[Any]] = nullcontext([])
        with self._outputs("both") if notes else nowhere as outputs:
            return Found(outputs, tuple(self._joint.run(self._loss, first, second)))

    def alone(self, batch: Any, ahead: Any) -> None:
        """Run either side by itself."""
        self.by_itself(batch, "first")
        self.by_itself(ahead, "second")

    def by_itself(self, part: Any, side: str) -> Found:
        """Run one side without the other, from the generators as they were."""
        self._before.replay()
        with self._outputs(side) as outputs:
            return Found(outputs, (self._loss(part),))

    @contextmanager
    def _outputs(self, side: str) -> Iterator[list[Any]]:
        """What the modules give inside, where gradients are wanted; for a side by itself if it is not ``"both"``."""
        joint = self._joint
        found: list[Any] = []

        def note(*call: Any) -> None:
            if torch.is_grad_enabled():
                found.append([leaf.detach().clone() for leaf in leaves(call[-1]) if leaf.is_floating_point()])

        handles: list[Any] = []
        before = joint.side

        def undo() -> None:
            for handle in handles:
                handle.remove()
            if side != "both":
                joint.side = before

        with always(undo), joint.aside() if side == "second" else nullcontext():
            handles += [module.register_forward_hook(note) for module in joint.modules]
            if side != "both":
                joint.side = side
            yield found


class _Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whatever is drawn has the same value, and dropout lets everything pass."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._value = value

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would load torch's compiler for nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        drops = next((name for name in ("dropout_p", "p") if name in names), None)
        if drops is not None and ("dropout" in str(func) or "attention" in str(func)):
            place = names.index(drops)
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = {**kwargs, drops: 0.0}
            return func(*args, **kwargs)
        drawn = func(*args, **kwargs)
        for leaf in leaves(drawn):
            leaf.fill_(self._value if leaf.is_floating_point() else 0)
        return drawn


def _drawn_beside_torch() -> tuple[object, bytes]:
    """The generators of Python and numpy, which the two sides draw from in turns."""
    numpy_random = sys.modules.get("numpy.random")
    return random.getstate(), b"" if numpy_random is None else pickle.dumps(numpy_random.get_state())


@torch.no_grad()
def _are_alike(some: Any, others: Any, tolerance: Callable[[Tensor], float]) -> bool:
    """Whether tensors have the same entries, but for rounding; waits for the device."""
    pairs = list(leaves(some)), list(leaves(others))
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and _is_close(a, b, tolerance(a)) for a, b in zip(*pairs, strict=True)
    )


@torch.no_grad()
def _is_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    difference, size = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
    return not bool(difference > tolerance * size)  # what is not finite is found by its gradient


def _rounding(a: Tensor) -> float:
    """By what two ways of summing may differ."""
    eps = torch.finfo(a.dtype).eps
    coarse = eps > 1e-4 or (
        a.dtype != torch.float64 and (a.device.type != "cpu" or torch._C._is_any_autocast_enabled())
    )
    return 0.1 if coarse else 1e3 * eps


def _same(a: Tensor) -> float:
    """By what the same way of summing may differ, where a device adds in any order."""
    return 8 * torch.finfo(a.dtype).eps
