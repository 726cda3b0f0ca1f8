"""SAM in one pass a step: the next step's ascent rides in this step's descent.

The first samples of the next batch travel behind this batch's through one forward and one backward. This batch's rows
see W + ε and give the gradient; those behind see W, and give the two products of the next power iteration. So ε is one
update old when it is used, on samples that it was found on.
"""

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nusam.ascent.findings import Job
from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import ONE_USE, SEVERAL_USES
from nusam.batch import first_samples, samples_in
from nusam.guards.handing import Handing
from nusam.layers.module_tree import is_compiled
from nusam.lmo import RankOne
from nusam.one_pass.carried import found_behind, iterations, perturb_by, weighed
from nusam.one_pass.copies import Copies
from nusam.one_pass.fitting import unfit
from nusam.one_pass.inputs import Unseen
from nusam.one_pass.joined import Joined
from nusam.one_pass.joint import CannotJoin, Joint, Rows, observed
from nusam.one_pass.looking import Backward, Looks, Loss, SmallBuffers, checked
from nusam.one_pass.looking_ahead import Loops
from nusam.one_pass.neighbours import Neighbours, are_the_same
from nusam.one_pass.riders import Riders
from nusam.placement.ledger import clear_gradients
from nusam.refusals import Unreachable
from nusam.stepping import Stepping

__all__ = ["OnePass"]

OFTEN = 32  # ascents up to which the looks, at the 2nd, 4th, 8th, …, are too many to look at everything

Aside = Callable[[], AbstractContextManager[object]]


class OnePass:
    """What is remembered from step to step."""

    def __init__(self, opt: Stepping) -> None:
        self._opt = opt
        self._known = Joined()
        self._copies: Copies | None = None  # of small matrices
        self._looked_at: set[Hashable] = set()  # modes of the modules in which samples have been seen to stay apart
        self._told: set[str] = set()
        self._aside: Aside = nullcontext
        self._looks = Looks(opt)
        self._handing = Handing("The loss that one_pass() is given")
        self._following: Any = None  # the batch behind that of the last step
        self._left: Any = None  # what then waited for it
        self.loops = Loops()

    @property
    def counts(self) -> bool:
        """Whether the loss that is computed is that of the step: of the whole batch, in its descent."""
        return self._looks.counts

    def step(
        self,
        batch: Any,
        following: Any,
        loss: Loss,
        backward: Backward,
        accumulate: bool,
        aside: Aside | None = None,
    ) -> Tensor:
        """Gradients of one batch at the perturbed weights; its loss there.

        ``aside``: a context for what the loss of the samples behind does, which then looks after its batch itself.
        """
        if not are_the_same(batch, self._following) and self._opt._waiting is self._left:
            self._opt._waiting = None  # it was found on a batch that did not come
        self._aside = aside or nullcontext
        try:
            value = self._taken(batch, following, loss if aside else partial(self._given, loss), backward, accumulate)
        finally:
            self._following, self._left = following, self._opt._waiting
        self._handing.learn()
        return value

    def _given(self, loss: Loss, part: Any) -> Tensor:
        with self._handing.out(part) as given:
            return loss(given)

    def _taken(self, batch: Any, following: Any, loss: Loss, backward: Backward, accumulate: bool) -> Tensor:
        opt = self._opt
        waiting, opt._waiting = opt._waiting, None
        if not opt.active:
            opt._check_cut(batch)
            with opt.descent(accumulate):
                return _run(batch, loss, backward)
        if self._refused:  # perhaps by the run that this one goes on from
            self._refuse(opt._refused)
        is_first = waiting is None and opt._progress.ascents == 0
        if not (is_first or self._refused or self._knows_modules()):  # after a resume, or a change
            self._learn(self._looks.modules(batch, loss))
        if self._refused or not self._knows_modules() or not self._fits():
            return self._in_two_passes(batch, loss, backward, accumulate)
        try:
            with opt._all_in_forward():
                return self._ridden(batch, following, waiting, loss, backward, accumulate)
        except CannotJoin as reason:
            self._refuse(str(reason))
            opt._guard.rewind()
        return self._in_two_passes(batch, loss, backward, accumulate)

    # ------------------------------------------------------------ the ways a step can go

    def _ridden(
        self,
        batch: Any,
        following: Any,
        waiting: dict[Tensor, RankOne] | None,
        loss: Loss,
        backward: Backward,
        accumulate: bool,
    ) -> Tensor:
        """With ε in the forward, and the next one's ascent behind this batch if there is a next one."""
        opt = self._opt

        due = opt._ascent.verification.is_due()
        if waiting is None or due:
            compares = nullcontext() if waiting is None else opt._ascent.only_compared()
            try:
                with compares, opt.ascent(accumulate), self._looks.for_nothing():
                    _run(first_samples(batch, opt.ascent_share), loss, backward)
            except Unreachable as refusal:
                raise CannotJoin(f"can't have every ε in its forward: {refusal.what}") from refusal
            if waiting is not None:
                opt._guard.rewind()
        else:
            opt._ascent.verification.advance()
        if waiting is not None:
            perturb_by(opt, waiting)
        if following is None:
            with opt.descent(accumulate):
                return _run(batch, loss, backward)
        both = Neighbours.of(batch, following, opt.ascent_share)
        riders = self._riders(both.rows)
        with opt._descent(accumulate, riders.of):
            return self._joined(riders, both, loss, backward, accumulate, due)

    def _in_two_passes(self, batch: Any, loss: Loss, backward: Backward, accumulate: bool) -> Tensor:
        """And learn which modules can be joined."""
        opt = self._opt
        assert opt.model is not None
        passes: dict[str, dict[nn.Module, list[int | None]]] = {}
        value = torch.zeros(())
        for name in opt._passes(accumulate):
            part = first_samples(batch, opt.ascent_share) if name == "ascent" else batch
            seen = passes[name] = {}
            observes = nullcontext() if self._refused else observed(opt.model, samples_in(part), seen)
            with observes, self._looks.for_nothing() if name == "ascent" else nullcontext():
                value = _run(part, loss, backward)
        if not self._refused:
            self._learn(list(passes.values()))
        return value

    def _learn(self, passes: list[dict[nn.Module, list[int | None]]]) -> None:
        model = self._opt.model
        assert model is not None
        self._known.learn(self._opt._structure_now(), passes)
        self._looked_at.clear()
        if not self._known.modules:
            self._refuse("has no module whose output has the samples' dimension")
        if any(is_compiled(module) for module in model.modules()):
            self._opt._ascent.compiles = True
        if self._looks.are_many():
            if self._opt._ascent.compiles:
                self._refuse("is compiled", why="processes add up what a graph does not hand out")
            is_own = self._opt._workers().is_own
            own = any(is_own(target.parameter) for target in self._opt._targets(factor=1.0))
            if self._looks.largest(float(own)):
                self._refuse("has matrices of one process alone", why="others see nothing of what it learns of them")

    def _joined(
        self, riders: Riders, both: Neighbours, loss: Loss, backward: Backward, accumulate: bool, due: bool
    ) -> Tensor:
        """One forward and one backward of both; of this batch alone if that can't be had."""
        opt = self._opt
        buffers = SmallBuffers(opt._guard.tree)
        modes = self._modes()
        is_new = modes not in self._looked_at
        check = due or is_new
        others = opt._guard.others.trained(opt._parameters(), opt._workers())
        goes_backward = adds_up = False
        is_whole = is_new or opt._progress.ascents > OFTEN
        refusal = self._looks.why_not(self._known, riders, both, loss, backward, is_whole) if check else None
        if refusal is None:
            self._looked_at.add(modes)
            assert self._copies is not None
            if check:
                self._copies.unwanted = riders.unsuited()
            # a wrapper would wait for the gradients of matrices that a step leaves out
            riders.get_ready(None if opt._ascent.compiles or self._looks.are_many() else self._copies)
            adds_up = accumulate or any(parameter.grad is not None for parameter in others)
            try:
                mine, other = riders.joint.run(lambda part: checked(loss(part)), both.batch, both.ahead)
                goes_backward = True
                backward(weighed(mine, other))
                opt._waiting = found_behind(opt, riders)
                return mine.detach()
            except CannotJoin as reason:
                if self._looks.are_many() or (adds_up and goes_backward):
                    where = "among processes" if self._looks.are_many() else "where gradients add up"
                    raise RuntimeError(
                        f"one_pass() can't go on {where}: the model {reason}, as it did in no step before; "
                        "loop over opt.passes(*batch) instead."
                    ) from reason
                refusal = reason
                if isinstance(reason, Unseen):
                    self._looked_at.discard(modes)
        self._refuse(str(refusal), for_good=refusal.for_good)
        buffers.restore()
        riders.go_alone()
        if goes_backward and not adds_up:
            clear_gradients([*opt._parameters(), *others])
        return _run(both.batch, loss, backward)

    # ------------------------------------------------------------ ε from step to step

    def _fits(self) -> bool:
        """Whether the layers of every target are known to serve it."""
        opt = self._opt
        found = opt._ascent.verification.found
        for parameter in (target.parameter for target in opt._targets()):
            why_not = unfit(self._known.structure, parameter, found.get(parameter), opt._ascent.compiles)
            if why_not:
                reason, why = (words.format(opt._names()[parameter]) for words in why_not)
                self._refuse(reason, why)
                break
        return not self._refused

    def _riders(self, rows: Rows) -> Riders:
        """The next step's ascent behind this step's descent."""
        opt = self._opt
        structure, modules = self._known.structure, self._known.modules
        assert structure is not None
        workers = opt._workers()
        shares = workers.splits_the_batch
        verification = opt._ascent.verification
        targets = [t._replace(radius=1.0 if t.radius > 0 else -1.0) for t in opt._targets(factor=1.0)]
        known = (ONE_USE, SEVERAL_USES)
        states = {t.parameter: opt._ascent.state_of(t) for t in targets if verification.of(t.parameter) in known}

        together = shares or any(workers.is_tensor_parallel(target.parameter) for target in targets)

        def job(parameter: Tensor) -> Job:
            keeps = together or verification.of(parameter) == SEVERAL_USES
            return Job(states[parameter], True, False, False, keeps, shares, False, True)

        if self._copies is None or self._copies.structure is not structure:
            self._copies = Copies(structure)
        pass_ = LayerPass(structure.uses, {}, iterations(opt.lmo), opt._ascent.compiles, structure.idle, set(), False)
        joint = Joint(modules, rows, self._aside, self._known.roles)
        return Riders(targets, states, job, pass_, joint, self._known.inputs)

    # ------------------------------------------------------------ where it can't be had

    @property
    def _refused(self) -> bool:
        """Whether every step takes two passes."""
        return bool(self._opt._refused)

    def _knows_modules(self) -> bool:
        return self._known.structure is not None and self._known.structure is self._opt._structure_now()

    def _modes(self) -> Hashable:
        """Which modules there are, and in which mode; cheap enough for every step."""
        tree = self._opt._guard.tree
        assert tree is not None
        return tree.walks, tuple(module.training for module in tree.modules)

    def _refuse(self, reason: str, why: str = "", for_good: bool = True) -> None:
        if for_good:
            self._opt._refused = reason
        if reason not in self._told:
            self._told.add(reason)
            how = "from now on every step takes" if for_good else "such a step is followed by one of"
            warnings.warn(
                f"one_pass() can't tell the samples apart, since the model {reason}; {how} two passes"
                f"{f' ({why})' if why else ''}.",
                stacklevel=2,
            )


def _run(part: Any, loss: Loss, backward: Backward) -> Tensor:
    """Forward and backward of one batch; its loss."""
    value = checked(loss(part))
    try:
        backward(value)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "The loss that one_pass() is given must leave the backward to one_pass(), and its graph has been freed; "
            "return the loss without calling backward()."
        ) from error
    return value.detach()
