"""Steps in one pass whose loss is a framework's training step, which may keep state and write into its batch.

The training step is called for a batch, for the samples of the next one that travel behind it, and in some steps to
look. So every call begins with what the step began with, each of the two that take turns has a state of its own, and in
the end everything is as the batch's own call left it: that is the one whose gradients are used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nusam.guards.batch_copies import BatchCopies, Entries
from nusam.integrations.batches import Kept
from nusam.integrations.state import State
from nusam.one_pass.looking_ahead import Ahead
from nusam.optimizer import SharpnessAware

__all__ = ["Riding", "Skipped"]

Run = Callable[[Any, bool], tuple[Tensor | None, Any]]


class Skipped(Exception):
    """A training step has no loss for its batch."""

    def __init__(self, result: Any, behind: bool) -> None:
        super().__init__()
        self.result, self.behind = result, behind


class Riding:
    """The steps of one training, one after the other.

    Args:
        step: what users call the training step.
    """

    def __init__(self, step: str) -> None:
        self.ahead: Ahead | None = None  # of the epoch that runs; no attribute of an owner, whose iterators are wound
        self.counts = True
        """Whether what is logged counts: what the batch's own call says in its descent."""
        self._step = step
        self._copies = BatchCopies(step)
        self._behind = False  # whether the samples behind have their turn

    def step(
        self,
        opt: SharpnessAware,
        owners: Sequence[object],
        batch: Any,
        following: Any,
        run: Run,
        backward: Callable[[Tensor], Any],
    ) -> Any:
        """What the training step returned for the batch, whose gradients are added to what is there.

        Args:
            opt: the optimizer.
            owners: whose attributes the training step may change.
            batch: as the framework hands it to the training step.
            following: the batch after it, or None.
            run: ``(batch, behind) -> (loss, result)``; ``behind`` where the samples are of the following batch.
            backward: runs a loss backwards.

        Raises:
            Skipped: if there is no loss for the batch.
            RuntimeError: if the training step changed what can't be brought back for another call.
        """
        steps = opt._begin_one_pass()
        result: Any = None
        if not opt.active:

            def alone(part: Any) -> Tensor:
                nonlocal result
                value, result = run(part, False)
                if value is None:
                    raise Skipped(result, False)
                return value

            steps.step(batch, following, alone, backward, True)
            return result
        seen = [Kept(batch, False), Kept(following, False)]
        if any(kept.has_graph for kept in seen):
            raise RuntimeError(
                f"{self._step} was given a batch that carries a graph of its own, backward through which only one of "
                f"two losses can go; compute that part in {self._step}."
            )
        owners = [*owners, *seen[0].objects, *seen[1].objects]
        before = State(owners, draws=True)
        theirs: State | None = None
        is_new = True
        written: list[Entries] = []

        def loss(part: Any) -> Tensor:
            nonlocal theirs, result, is_new
            behind = self._behind
            self.counts = steps.counts and not behind
            if not behind:
                if not is_new:
                    before.restore()
                theirs, is_new = None, False
            entries: list[Entries] = []
            given = Kept(part, self._copies.are_made).again(entries)
            value, found = run(given, behind)
            written.extend(each for each in entries if each.are_written())
            if value is None:
                raise Skipped(found, behind)
            if not behind:
                result = found
            return value

        @contextmanager
        def aside() -> Iterator[None]:
            nonlocal theirs
            mine, counts = State(owners), self.counts
            (before if theirs is None else theirs).restore()
            self._behind, self.counts = True, False
            try:
                yield
            finally:
                self._behind, self.counts = False, counts
                theirs = State(owners)
                mine.restore()

        try:
            waiting = opt._waiting
            try:
                steps.step(batch, following, loss, backward, True, aside)
            except Skipped as skipped:
                if not skipped.behind:
                    raise
                opt._waiting = waiting
                steps.step(batch, None, loss, backward, True, aside)
            self._learn(before, written)
            return result
        finally:
            self.counts = True
            before.release()

    def _learn(self, before: State, written: list[Entries]) -> None:
        self._copies.note(written)
        self._copies.step_is_over()
        name = before.lost()
        if name is not None:
            raise RuntimeError(
                f"{self._step} changes {name} in a way that can't be taken back, though it is called for the samples "
                "of the next batch too; make it a buffer of the model, or change it after the step."
            )
