"""Losses that are computed to look: which modules can be joined, and whether their samples stay apart."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nusam.batch import first_samples, samples_in
from nusam.distributed.blocks import compute_device, is_sharded
from nusam.distributed.sums import Ranks
from nusam.guards.batch_copies import Written
from nusam.guards.buffers import SMALL
from nusam.interrupts import always
from nusam.layers.module_tree import ModuleTree
from nusam.one_pass.joined import Joined
from nusam.one_pass.joint import CannotJoin, observed
from nusam.one_pass.meeting import Meeting
from nusam.one_pass.neighbours import Neighbours
from nusam.one_pass.riders import Riders
from nusam.placement.ledger import clear_gradients
from nusam.stepping import Stepping

__all__ = ["Backward", "Loss", "Looks", "SmallBuffers", "checked"]

NOT_FINITE = "has a gradient that is not finite"

Loss = Callable[[Any], Tensor]
Backward = Callable[[Tensor], Any]


class Looks:
    """Losses that leave no trace, of the batches of one optimizer."""

    def __init__(self, opt: Stepping) -> None:
        self._opt = opt
        self.counts = True
        """Whether the loss that is computed is that of the step: of the whole batch, in its descent."""

    def modules(self, batch: Any, loss: Loss) -> list[dict[nn.Module, list[int | None]]]:
        """What a share of the batch and all of it show of the modules."""
        opt = self._opt
        assert opt.model is not None
        passes: list[dict[nn.Module, list[int | None]]] = [{}, {}]
        with self._without_a_trace(), self.for_nothing():
            for part, seen in zip((first_samples(batch, opt.ascent_share), batch), passes, strict=True):
                with observed(opt.model, samples_in(part), seen):
                    loss(part)
        opt._workers().reshard()  # as a backward would have done it
        return passes

    @contextmanager
    def _without_a_trace(self) -> Iterator["SmallBuffers"]:
        """Generators and small buffers are put back."""
        opt = self._opt
        random_state, buffers = opt._guard.random_state(), SmallBuffers(opt._guard.tree)
        try:
            yield buffers
        finally:
            buffers.restore()
            random_state.replay()

    @contextmanager
    def for_nothing(self) -> Iterator[None]:
        """Losses that are no step's."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def are_many(self) -> bool:
        """Whether other processes do the same, and must go on doing so."""
        workers = self._opt._workers()
        return workers.replicates or workers.shards or any(map(is_sharded, self._opt._parameters()))

    def why_not(
        self, known: Joined, riders: Riders, both: Neighbours, loss: Loss, backward: Backward, is_whole: bool
    ) -> CannotJoin | None:
        """What keeps the samples from travelling together through any of the modules; nothing if they can.

        Inputs that all samples share are looked for where tables are looked up, or where there is a reason to.

        ``is_whole``: whether to look for what no gradient shows, too.

        Raises:
            Exception: of the loss, unless it comes of the travelling.
        """
        compares = known.has_tables()
        while True:
            refusal = self._why_not(riders, both, loss, backward, is_whole, compares)
            if refusal is None or not refusal.for_good or self.are_many() or (compares and not known.narrow()):
                return refusal
            compares, riders.joint.modules = True, known.modules

    def _why_not(
        self, riders: Riders, both: Neighbours, loss: Loss, backward: Backward, is_whole: bool, compares: bool
    ) -> CannotJoin | None:
        """What keeps them, in this process or in another, from doing so through the modules that are joined."""
        found = None
        try:
            self._check(riders, both, loss, backward, is_whole, compares)
        except CannotJoin as reason:
            found = reason
        except (torch.OutOfMemoryError, Written):
            raise
        except Exception as error:
            # among processes the others would wait for one that looks again
            if not (self.are_many() or self._comes_of_joining(error, riders, both, loss, backward, is_whole, compares)):
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            found = CannotJoin(f"raises an error where samples of two batches travel together, {said:.300}")
        if self.are_many():
            # batches of which some can't travel together will come again, when nobody can ask the others
            level = 0.0 if found is None else 1.0 + (found.for_good or str(found) != NOT_FINITE)
            refused = self.largest(level)
            if refused:
                why = "does not in another process" if found is None else str(found)
                found = CannotJoin(why, for_good=refused == 2)
        return found

    def _comes_of_joining(
        self,
        error: Exception,
        riders: Riders,
        both: Neighbours,
        loss: Loss,
        backward: Backward,
        is_whole: bool,
        compares: bool,
    ) -> bool:
        """Whether an error rises again where samples travel together, and not where either side is by itself."""
        riders.forget()
        try:
            self._check(riders, both, loss, backward, is_whole, compares)
        except CannotJoin:
            return False
        except Exception as again:
            if type(again) is not type(error):
                return False
        else:
            return False
        riders.forget()
        with self._without_a_trace(), self.for_nothing():
            try:
                Meeting(riders.joint, loss, self._opt._guard.random_state).alone(both.batch, both.ahead)
            except Exception:
                return False
        return True

    def largest(self, level: float) -> float:
        """Of what the processes give that do the same."""
        parameters = self._opt._parameters()
        levels = [torch.tensor(level, device=compute_device(parameters[0]))]
        Ranks([self._opt._workers().everyone(parameters)]).max_(levels)
        return float(levels[0])

    def _check(
        self, riders: Riders, both: Neighbours, loss: Loss, backward: Backward, is_whole: bool, compares: bool
    ) -> None:
        """Run each loss backwards by itself: a gradient that reaches the other's samples would be seen.

        Forwards by itself too: samples may meet where no gradient passes, and what they share is as large then.
        """
        opt = self._opt
        reached = []

        def computed(part: Any) -> Tensor:
            return checked(loss(part))

        riders.get_ready()
        with ExitStack() as contexts:
            buffers = contexts.enter_context(self._without_a_trace())
            for context in (opt._workers().ascent(False), self.for_nothing()):
                contexts.enter_context(context)
            parameters = contexts.enter_context(self._set_aside())
            if opt._ascent.compiles:
                contexts.enter_context(torch.compiler.set_stance("force_eager"))  # a graph shows none of its gradients
            meeting = Meeting(riders.joint, computed, opt._guard.random_state)
            contexts.callback(riders.look_no_more)
            if compares:
                with riders.noting_inputs():
                    meeting.by_itself(both.batch, "first")
                riders.forget()
            for number, side in enumerate(("first", "second")):
                mixed = riders.mixed(side)
                together = meeting.together(both.batch, both.ahead, is_whole)
                backward(together.losses[number])
                reached.append(mixed.value())
                clear_gradients(parameters)
                riders.forget()
                if buffers.moved():
                    raise CannotJoin("has buffers that move with the samples")
            riders.look_no_more()
            meet = is_whole and meeting.found(both, together, self.are_many())
            opt._workers().reshard()  # as a backward would have done it
            riders.forget()
        if any(x != x for x in reached):
            raise CannotJoin(NOT_FINITE, for_good=False)
        if meet or any(reached):
            raise CannotJoin("computes a sample from others in its batch")

    @contextmanager
    def _set_aside(self) -> Iterator[list[Tensor]]:
        """Gradients of micro-batches before are not there, and come back; also those that another optimizer takes."""
        opt = self._opt
        parameters = [*opt._parameters(), *opt._guard.others.trained(opt._parameters(), opt._workers())]
        kept = [opt._workers().kept(parameter.grad) for parameter in parameters]

        def undo() -> None:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient

        with always(undo):
            clear_gradients(parameters)
            yield parameters


class SmallBuffers:
    """Small buffers of a model as they were, which a forward that is not to count may have moved."""

    @torch.no_grad()
    def __init__(self, tree: ModuleTree | None) -> None:
        if tree is not None:
            tree.refresh()
        buffers = [] if tree is None else [b for own in tree.buffers for b in own.values() if b is not None]
        self._buffers = [b for b in dict.fromkeys(buffers) if b.device.type != "meta" and b.numel() <= SMALL]
        self._before = [buffer.clone() for buffer in self._buffers]

    def moved(self) -> bool:
        """Whether any is another than it was, counters apart; waits for the device."""
        pairs = [(a, b) for a, b in zip(self._buffers, self._before, strict=True) if a.is_floating_point()]
        return any(not torch.equal(a, b) for a, b in pairs)

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)


def checked(value: Any, by: str = "one_pass()") -> Tensor:
    """The loss, if it is one.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"The loss that {by} is given must return a tensor with one value, got {kind}.")
    return value.reshape(()) if value.ndim else value
