"""The same batch and the same beginnings for every pass of a framework's training step.

A training step is a user's function that runs twice on one batch. It may take entries out of the batch, write into its
tensors, count its calls, gather losses in a list, or draw from an iterator; its second run would go on where the first
one ended. So every later pass begins with what the first one found, and in the end everything is as the first one left
it: that one was at the weights themselves, as is the loss that frameworks log.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from nusam.batch import first_samples
from nusam.guards.batch_copies import BatchCopies
from nusam.guards.model_guard import RandomState
from nusam.integrations.batches import Kept
from nusam.integrations.state import State

__all__ = ["Replay"]


class Prepared(NamedTuple):
    """What the first pass prepared, and what it left in doing so."""

    kept: Kept
    random_state: RandomState | None
    left: State | None  # for a later pass that counts, which begins before it was prepared


class Replay:
    """The passes of one training step after the other.

    Args:
        step: what users call the training step.
    """

    def __init__(self, step: str) -> None:
        self.later = False
        """Whether the pass that runs is not the first one over its batch."""
        self.counts = True
        """Whether what is logged in the pass that runs counts: the first one's over a whole batch."""
        self._step = step
        self._shares = False  # whether the ascent sees a share of the batch
        self._cut: Callable[[Any], Any] | None = None  # what is prepared is cut by, rather than the batch
        self._copies = BatchCopies(step)
        self._owners: list[object] = []
        self._after: State | None = None  # what the first of several passes left
        self._kept: list[Kept] | None = None  # while the first of several passes runs
        self._is_ascent = False
        self._prepared: list[Prepared] = []
        self._asked_for: Iterator[Prepared] = iter(())

    def passes(
        self, passes: Iterator[str], owners: Sequence[object], batch: Any, share: float = 1.0, prepares: bool = False
    ) -> Iterator[tuple[str, Any]]:
        """The name of every pass, and the batch for it.

        Args:
            passes: the names, ``"ascent"`` and ``"descent"``; left with the loop, if they can be closed.
            owners: whose attributes the training step may change.
            batch: as the framework hands it to the training step.
            share: of the batch that an ascent sees. Below 1 it is the last pass that counts, which sees all of it.
            prepares: whether it is the share of what :meth:`once` prepares, which may generate from all of the batch.

        Raises:
            ValueError: if a share can't be cut off.
            RuntimeError: if the first pass changed what can't be brought back for the next, or prepared nothing.
        """
        before: State | None = None
        kept: Kept | None = None
        self._shares = share < 1
        self._cut = partial(first_samples, share=share) if self._shares and prepares else None
        cut = partial(first_samples, share=1.0 if prepares else share)
        try:
            for name in passes:
                self._is_ascent = name == "ascent"
                if before is not None and kept is not None:
                    before.restore()
                    self._asked_for = iter(self._prepared)
                    self.later = True
                    self.counts = name == "descent" and self._shares
                    again = kept.again()
                    yield name, cut(again) if self._is_ascent else again
                elif name != "ascent":  # the only pass
                    yield name, batch
                else:
                    self._kept, self._prepared = [], []
                    kept = self._keep(batch)
                    self._owners = [*owners, *kept.objects]
                    before = State(self._owners, draws=True)
                    self.counts = not self._shares
                    yield name, cut(batch)
                    if self._cut is not None and not self._prepared:
                        raise RuntimeError(
                            f"{self._step} does not call _prepare_inputs, whose inputs ascent_share={share:g} is to "
                            "be cut from; call it, or use ascent_share=1."
                        )
                    self._learn(before)
                    self._after = None if self._shares else State(self._owners)
        finally:
            try:
                if hasattr(passes, "close"):  # whoever holds on to it, as the frames of an exception do
                    passes.close()
            finally:
                after, self._after = self._after, None
                self._kept, self._prepared, self._owners, self.later, self.counts = None, [], [], False, True
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
            self._after = State(self._owners)

    def once(self, prepare: Callable[..., Any], model: nn.Module | None = None) -> Callable[..., Any]:
        """The function, called in the first pass alone; later ones get what it returned.

        Args:
            prepare: makes inputs of a batch.
            model: whose generators it may draw from; what is drawn after it is then the same in every pass.
        """

        def prepare_once(*args: Any, **options: Any) -> Any:
            if self._shares and self._cut is None:
                return prepare(*args, **options)  # of another batch in every pass
            cut = self._cut if self._cut is not None and self._is_ascent else lambda result: result
            if self.later:
                prepared = next(self._asked_for, None)
                if prepared is None:
                    raise RuntimeError(
                        f"{self._step} prepared its inputs more often in the second pass over a batch than in the "
                        "first, so that the passes would differ; prepare them equally often."
                    )
                if prepared.left is not None:
                    prepared.left.restore()
                if prepared.random_state is not None:
                    prepared.random_state.replay()
                return cut(prepared.kept.again())
            result = prepare(*args, **options)
            if self._kept is not None:
                random_state = None if model is None else RandomState(model.parameters())
                left = None if self._cut is None else State(self._owners)
                self._prepared.append(Prepared(self._keep(result), random_state, left))
            return cut(result)

        return prepare_once

    def _keep(self, batch: Any) -> "Kept":
        kept = Kept(batch, self._copies.are_made)
        if kept.has_graph:
            raise RuntimeError(
                f"{self._step} was given a batch that carries a graph of its own, backward through which only one of "
                f"two passes can go; compute that part in {self._step}."
            )
        if self._kept is not None:
            self._kept.append(kept)
        return kept

    def _learn(self, before: "State") -> None:
        self._copies.note(entries for kept in self._kept or () for entries in kept.entries)
        self._copies.step_is_over()
        self._kept = None
        name = before.lost()
        if name is not None:
            raise RuntimeError(
                f"{self._step} changes {name} in a way that can't be taken back before the second pass, where it would "
                "change again; make it a buffer of the model, or change it after the step."
            )
