"""How a step goes: the ascent finds ε, the descent takes the gradient at x + ε."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import BESIDE
from nusam.both_gradients import BothGradients
from nusam.distributed.data_parallel import DataParallel
from nusam.guards.changes import Changes
from nusam.guards.weights import check_parameter
from nusam.interrupts import always
from nusam.layers.outside_graphs import watched_outside_graphs
from nusam.layers.reads import Backwards, watched
from nusam.layers.uses import rerouted
from nusam.lmo import Epsilon, Nuclear, RankOne, State
from nusam.overlaps import one_inside_the_other, share_needs
from nusam.placement.in_forward import InForward
from nusam.placement.ledger import clear_gradients
from nusam.refusals import CHANGED, OTHERWISE_USED, Checked
from nusam.targets import Target, mixed
from nusam.uncompiled import uncompiled
from nusam.wrapper import itself

__all__ = ["TwoPasses"]


Handlers = Callable[[dict[Tensor, RankOne]], dict[Tensor, Any]]  # that add ε in the forward


class TwoPasses(Checked):
    """The ascent finds ε, and the descent takes the gradient at x + ε."""

    _backwards: Backwards
    _both: BothGradients
    _ascended: list[Tensor]  # the targets of the ascent that the next descent belongs to
    _had_pass = False  # whether a descent pass ran since the last step
    _may_repeat = False  # whether a step's loop would come back for another ascent
    _repeats = False  # and whether it must
    _looked_for = Changes((), 0)  # of matrices whose gradient the loop looked for in an ascent that left none
    _states_before: dict[Tensor, State] | None = None  # of before that ascent
    _may_start_over = False  # whether a step's loop would come back for both passes
    _starts_over = False  # and whether it must
    _layer_pass: LayerPass | None = None  # of the ascent that runs
    _in_scaler = False  # whether a GradScaler has asked, as it does before it calls step()

    @property
    def _needs_ascent(self) -> bool:
        """Whether a perturbed step has two passes."""
        return self.direction.needs_gradient or self.combination is not None

    @one_inside_the_other
    def ascent(self, accumulate: bool = False) -> Iterator[None]:
        """The first half of :meth:`passes`, for loops whose passes live in different functions.

        On leaving, ε is computed from the gradients, and these are put away. While :attr:`active` is False
        there is nothing to gain from running it.
        """
        self = itself(self)
        self._refuse_inside_pass("ascent()")
        others = self._begin_among_others(accumulate)
        targets = self._targets_of_pass() if self.active else []
        workers = self._workers()
        self._check_processes(workers)
        workers.reshard()
        everything = self._parameters()
        parameters = [] if self._apart else everything  # whose gradients are ours to put away
        serves = self.model is not None and isinstance(self.lmo, Nuclear)
        in_forward = {target.parameter for target in targets if self._in_forward(target.parameter)} if serves else set()
        frees = self._in_backward is not None
        self._ledger.tell(self._ascent.learn_late(), self._names, OTHERWISE_USED)
        pass_ = self._ascent.prepare(self._structure_now(), targets, in_forward, workers, frees, everything)
        self._check_formed(targets, pass_)
        share_needs(self, pass_, others)
        reduces = workers.reduces_gradients(pass_ is not None)
        kept = [workers.kept(parameter.grad) if accumulate else None for parameter in parameters]
        check = self._is_looked_at()

        def undo() -> None:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
            if pass_:
                self._ascent.see_looks(pass_)
                pass_.release()
            self._pass = self._layer_pass = None

        self._pending = self._waiting = None
        self._is_carried = self._repeats = False
        self._looked_for, self._states_before = Changes((), 0), None
        with ExitStack() as apart, always(undo), workers.ascent(reduces), pass_.running() if pass_ else nullcontext():
            self._pass, self._layer_pass = "ascent", pass_
            self._in_scaler = False  # a step that the scaler skipped is over
            clear_gradients(parameters)
            self._ledger.begin_pass()
            apart.enter_context(self._guard.ascent(check, self.ascent_share))
            if not self._apart:
                apart.enter_context(self._guard.others.put_away(everything, workers, check, others))
            reached = everything if self.targets == "trainable" else {*everything, *(t.parameter for t in targets)}
            self._written.before_ascent(reached, check, self._guard.tree)
            in_the_loop = pass_.in_the_loop() if pass_ else nullcontext()
            with self._backwards.of_ascent() if in_forward else nullcontext(), in_the_loop:
                yield
            self._guard.after_ascent()
            self._written.after_ascent()
            if pass_:
                self._check_ascent(pass_)
                pass_.settle()
            found = bool(pass_ and pass_.saw_gradients()) or any(p.grad is not None for p in parameters)
            self._ledger.end_pass("ascent", found, self._has_closure)
            self._ascended = [target.parameter for target in targets]
            self._pending = self._perturb(targets, pass_, workers, in_forward)
            if check and self.ascent_share < 1:
                self._warn_of_no_epsilon()

    @uncompiled
    def descent(self, accumulate: bool = False) -> Iterator[None]:
        """The second half of :meth:`passes`: inside, the weights are x + ε; afterwards x again."""
        with itself(self)._descent(accumulate):
            yield

    @one_inside_the_other
    def _descent(self, accumulate: bool = False, handlers: Handlers | None = None) -> Iterator[None]:
        """With ε in the forward by what ``handlers`` makes of it, if that is given."""
        self._refuse_inside_pass("descent()")
        self._begin_among_others(accumulate)
        if self._in_backward and accumulate:
            raise RuntimeError("accumulate=True needs gradients that step_in_backward() frees; use one or the other.")
        if self._pending is None and self.active and self._needs_ascent:
            raise RuntimeError(
                "descent() was entered without a perturbation; run 'with opt.ascent():' on the same sample first, "
                "or loop over opt.passes()."
            )
        if self._pending is None:  # none came before, or it was refused
            self._ascended = []
            self._guard.forget_ascent()
            self._written.forget_ascent()
            self._both.forget()
            if self.active:
                self._draw()
        perturbations = self._pending or {}
        if not perturbations:  # the ascent's gradient would be the descent's
            self._both.forget()
        pairs = {p: e for p, e in perturbations.items() if type(e) is RankOne and self._in_forward(p)}
        forward = self._handlers(pairs) if handlers is None else handlers(pairs)
        in_place = [p for p in perturbations if p not in pairs] if pairs else list(perturbations)
        parameters = self._parameters()
        workers = self._workers()
        self._check_processes(workers)
        workers.reshard()  # layers are known by what they hold then
        structure = self._structure_now()
        unreached = {p for p in self._ascended if p not in perturbations}
        # processes with perturbations of their own would drift apart by the rounding of a subtraction
        bit_exact = self.m_sam is not False
        others = [] if self._in_backward else parameters  # those are written by the base optimizer
        perturbed = self._written.in_weights(
            {p: perturbations[p] for p in in_place}, bit_exact, structure, others, unreached
        )

        def undo() -> None:
            perturbed.remove()
            for parameter, handler in forward.items():
                handler.restore(parameter)
            if in_place:
                workers.reshard()
            self._pass = None
            self._ascended, self._looked_for = [], Changes((), 0)

        # ε goes first: what the guard leaves then may be a weight whose copy was restored
        with always(undo), ExitStack() as guards, always(perturbed.remove):
            self._pass = "descent"
            self._in_scaler = False
            if not accumulate:
                clear_gradients(parameters)
            self._ledger.begin_pass()
            self._ledger.open(unreached)
            guards.enter_context(self._guard.descent(bool(perturbations), self.ascent_share == 1))
            if forward and structure is not None:
                guards.enter_context(rerouted(structure.uses, forward))
            if self._in_backward:
                guards.enter_context(self._in_backward.running())
            self._pending = None
            self._had_pass = True
            del perturbations
            if self.combination is not None and self._is_on:
                guards.enter_context(self._combined(workers, accumulate))
            perturbed.add()
            if in_place:
                workers.reshard()
            watch = watched if self._ascent.sees_calls else watched_outside_graphs
            changes = self._looked_for
            watch_changes = changes.watched() if changes.parameters and not self._in_backward else nullcontext()

            def close() -> None:
                if changes.found:
                    self._keep_gradients(changes.found, workers)
                self._refuse_written(forward)
                self._close_ledger({parameter: forward[parameter] for parameter in pairs})

            backwards = self._backwards.of_descent() if forward else nullcontext()
            with backwards, watch(forward), watch_changes, self._closed_by_the_step(close):
                yield
            close()
            self._written.after_descent(self._names)
            if not (accumulate or self._in_backward):
                found = any(parameter.grad is not None for parameter in parameters)
                self._ledger.end_pass("descent", found, self._has_closure, bool(forward) and self._backwards.ran)

    def _keep_gradients(self, changed: list[Tensor], workers: DataParallel) -> None:
        """The loop needs gradients, which this step's ascent did not have: begin anew with them, or say so."""
        if workers.replicates or workers.shards:  # not all of which need know of it
            self._ledger.tell(changed, self._names, CHANGED)
            return
        self._ascent.verification.leave_gradients(changed)
        if self._structure is not None:
            self._structure.idle.show()
        if self._may_start_over and not self._overlaps:
            self._starts_over = True
        else:
            self._ledger.tell(changed, self._names, f"{CHANGED}, as from now on")

    def _combined(self, workers: DataParallel, accumulate: bool) -> AbstractContextManager[None]:
        self._targets()  # so that what is remembered follows the parameters in a step without an ascent too
        seeds = {p: mixed(self.seed, i) for i, p in enumerate(self._parameters())}

        def state_of(parameter: Tensor) -> State:
            return self._ascent.state_of(Target(parameter, 0.0, seeds[parameter]))

        return self._both.combined(self._parameters(), workers, accumulate, state_of, self._ascent.states)

    def _draw(self) -> None:
        """ε for a descent without an ascent."""
        targets = self._targets_of_pass()
        self._pending = self._ascent.drawn(targets, mixed(self.seed, self._progress.steps), self._age)
        self._ascended = [target.parameter for target in targets]
        self._progress.ascents += bool(self._pending)

    def _handlers(self, pairs: dict[Tensor, RankOne]) -> dict[Tensor, Any]:
        return {p: InForward(epsilon.u, epsilon.v, self._backwards.is_over) for p, epsilon in pairs.items()}

    def _perturb(
        self, targets: list[Target], pass_: LayerPass | None, workers: DataParallel, in_forward: set[Tensor]
    ) -> dict[Tensor, Epsilon]:
        """ε for every target that the ascent reached."""
        for target in targets:
            gradient = target.parameter.grad
            if gradient is not None and not self._apart:
                if gradient.layout != torch.strided:
                    check_parameter(target.parameter, self.lmo, self.placement, reachable=True)
                if gradient.requires_grad:
                    target.parameter.grad = gradient.detach()  # create_graph=True leaves a graph on it
        if pass_ is not None:
            self._ascent.compare(pass_, workers, self._everyone(workers))
            surprises = self._ascent.surprises(pass_)
            self._ascent.mistrust(pass_, surprises)
            if surprises and self._may_repeat and not (self._overlaps or workers.replicates or workers.shards):
                self._repeats, self._may_repeat = True, False
                return {}
            targets = [target for target in targets if target.parameter not in surprises]
            self._ascended = [target.parameter for target in targets]
            self._ledger.tell(list(surprises), self._names, OTHERWISE_USED)
            self._looked_for = Changes(self._ascent.looked_for(pass_), pass_.backwards)
            if self._looked_for.parameters:
                self._states_before = self._ascent.copied_states()
        there = [target.parameter for target in targets if target.parameter in in_forward]
        self._refuse_unreachable(there, self._ascent.unreachable)
        seed = mixed(self.seed, self._progress.steps)
        found = self._ascent.perturbations(
            targets, pass_, seed, workers, self._age, lambda: self._both.keep(self._parameters())
        )
        # what this process alone knows is said once all have had their sums
        records = pass_.records.values() if pass_ is not None and pass_.keeps else []
        served = [r for r in records if r.job.in_forward and not r.job.checks and not r.is_altered]
        beside = [record.parameter for record in served if record.gradient is not None]
        self._refuse_unreachable(there, dict.fromkeys(beside, BESIDE))
        self._ascent.verification.advance()
        if found:
            self._progress.ascents += 1
        return found
