"""SAM in one pass a step: the next step's ascent rides in this step's descent.

The first samples of the next batch travel behind this batch's through one forward and one backward. This batch's rows
see W + ε and give the gradient; those behind see W, and give the two products of the next power iteration. So ε is one
update old when it is used, on samples that it was found on.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nusam.ascent.findings import Job
from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import ONE_USE, OTHERWISE, SEVERAL_USES, Verdict
from nusam.base_step import Stepping
from nusam.batch import first_samples, samples_in
from nusam.layers.module_tree import is_compiled
from nusam.layers.structure import Structure
from nusam.lmo import LMO, Nuclear, RankOne
from nusam.one_pass.copies import Copies
from nusam.one_pass.joint import CannotJoin, Joint, Rows, joinable, observed
from nusam.one_pass.looking import Backward, Looks, Loss, SmallBuffers, checked
from nusam.one_pass.riders import Riders
from nusam.placement.ledger import clear_gradients
from nusam.refusals import Unreachable

__all__ = ["OnePass", "looked_ahead"]

# The loss of the samples behind counts so little that what it leaves in a gradient which is not told apart by rows (of
# a norm, a position, a layer that is no target) is below any rounding. The products have no scale.
BEHIND = 2.0**-60

Aside = Callable[[], AbstractContextManager[object]]


def looked_ahead(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Every batch with the one after it; the last with None."""
    iterator = iter(batches)
    try:
        batch = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield batch, following
        batch = following
    yield batch, None


class OnePass:
    """What is remembered from step to step."""

    def __init__(self, opt: Stepping) -> None:
        self._opt = opt
        self._modules: list[nn.Module] | None = None  # whose calls are joined
        self._structure: Structure | None = None  # of the model when they were found
        self._copies: Copies | None = None  # of small matrices
        self._refused = False
        self._checked = False
        self._told: set[str] = set()
        self._aside: Aside = nullcontext
        self._looks = Looks(opt)

    @property
    def counts(self) -> bool:
        """Whether the loss that is computed is that of the step: of the whole batch, in its descent."""
        return self._looks.counts

    def step(
        self, batch: Any, following: Any, loss: Loss, backward: Backward, accumulate: bool, aside: Aside = nullcontext
    ) -> Tensor:
        """Gradients of one batch at the perturbed weights; its loss there.

        ``aside``: a context for what the loss of the samples behind does.
        """
        opt = self._opt
        self._aside = aside
        loss = partial(_of_a_copy, loss)
        waiting, opt._waiting = opt._waiting, None
        if not opt.active:
            with opt.descent(accumulate):
                return _run(batch, loss, backward)
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
            self._perturb_by(waiting)
        if following is None:
            with opt.descent(accumulate):
                return _run(batch, loss, backward)
        ahead = first_samples(following, opt.ascent_share)
        check = due or not self._checked
        riders = self._riders(batch, ahead)
        with opt._descent(accumulate, riders.of):
            return self._joined(riders, batch, following, ahead, loss, backward, accumulate, check)

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
        self._structure = self._opt._structure_now()
        self._modules = joinable(model, passes)
        self._checked = False
        if not self._modules:
            self._refuse("has no module whose output has the samples' dimension")
        if any(is_compiled(module) for module in model.modules()):
            self._opt._ascent.compiles = True
        if self._opt._ascent.compiles and self._looks.are_many():
            self._refuse("is compiled", why="processes add up what a graph does not hand out")

    def _joined(
        self,
        riders: Riders,
        batch: Any,
        following: Any,
        ahead: Any,
        loss: Loss,
        backward: Backward,
        accumulate: bool,
        check: bool,
    ) -> Tensor:
        """One forward and one backward of both; of this batch alone if that can't be had."""
        opt = self._opt
        buffers = SmallBuffers(opt._guard.tree)
        refusal = self._looks.why_not(riders, batch, following, loss, backward) if check else None
        if refusal is None:
            self._checked = True
            assert self._copies is not None
            if check:
                self._copies.unwanted = riders.unsuited()
            # a wrapper would wait for the gradients of matrices that a step leaves out
            riders.get_ready(None if opt._ascent.compiles or self._looks.are_many() else self._copies)
            goes_backward = False
            try:
                mine, other = riders.joint.run(lambda part: checked(loss(part)), batch, ahead)
                goes_backward = True
                backward(torch.add(mine, other.to(mine.dtype), alpha=BEHIND))
                opt._waiting = self._found(riders)
                return mine.detach()
            except CannotJoin as reason:
                if self._looks.are_many() or (accumulate and goes_backward):
                    where = "among processes" if self._looks.are_many() else "with accumulate=True"
                    raise RuntimeError(
                        f"one_pass() can't go on {where}: the model {reason}, as it did in no step before; "
                        "loop over opt.passes(*batch) instead."
                    ) from reason
                refusal = reason
        self._refuse(str(refusal), for_good=refusal.for_good)
        buffers.restore()
        riders.go_alone()
        if not accumulate:
            clear_gradients(opt._parameters())
        return _run(batch, loss, backward)

    # ------------------------------------------------------------ ε from step to step

    def _fits(self) -> bool:
        """Whether the layers of every target are known to serve it."""
        opt = self._opt
        found = opt._ascent.verification.found
        for parameter in (target.parameter for target in opt._targets()):
            unfit = _unfit(self._structure, parameter, found.get(parameter), opt._ascent.compiles)
            if unfit:
                reason, why = (words.format(opt._names()[parameter]) for words in unfit)
                self._refuse(reason, why)
        return not self._refused

    def _riders(self, batch: Any, ahead: Any) -> Riders:
        """The next step's ascent behind this step's descent."""
        opt = self._opt
        structure, modules = self._structure, self._modules
        assert structure is not None
        assert modules is not None
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
        pass_ = LayerPass(structure.uses, {}, _iterations(opt.lmo), opt._ascent.compiles, structure.idle, set(), False)
        rows = Rows(samples_in(batch), samples_in(ahead))
        return Riders(targets, states, job, pass_, Joint(modules, rows, self._aside))

    @torch.no_grad()
    def _found(self, riders: Riders) -> dict[Tensor, RankOne] | None:
        """The next step's ε, for radii of 1; None if a layer was used otherwise than before."""
        opt = self._opt
        ascent = opt._ascent
        pass_ = riders.pass_
        riders.settle(_iterations(opt.lmo))
        otherwise = [p for p, record in pass_.records.items() if record.is_lost() or record.count_differs()]
        for parameter in otherwise:
            ascent.verification.forget(parameter)
        if otherwise:
            pass_.release()
            return None
        others = [target.parameter for target in riders.targets if target.parameter not in pass_.known]
        gradients = [parameter.grad for parameter in others]
        measured = ascent.measured
        for parameter in others:
            parameter.grad = None  # this batch's, which is no part of the next ε
        try:
            found = ascent.perturbations(riders.targets, pass_, 0, opt._workers())
        finally:
            ascent.measured = measured
            for parameter, gradient in zip(others, gradients, strict=True):
                parameter.grad = gradient
            pass_.release()
        pairs = {p: epsilon for p, epsilon in found.items() if isinstance(epsilon, RankOne)}
        if pairs:
            torch._foreach_div_([epsilon.sigma for epsilon in pairs.values()], BEHIND)
        return pairs

    def _perturb_by(self, waiting: dict[Tensor, RankOne]) -> None:
        """The next descent perturbs by what an earlier pass has found, for radii of 1."""
        opt = self._opt
        targets = opt._targets()
        found = [(t.parameter, abs(t.radius), waiting[t.parameter]) for t in targets if t.parameter in waiting]
        radii = [radius for _, radius, _ in found]
        vs, norms = [epsilon.v for _, _, epsilon in found], [epsilon.norm for _, _, epsilon in found]
        if found:
            vs, norms = list(torch._foreach_mul(vs, radii)), list(torch._foreach_mul(norms, radii))
        opt._pending = {
            parameter: RankOne(epsilon.u, v, epsilon.sigma, norm)
            for (parameter, _, epsilon), v, norm in zip(found, vs, norms, strict=True)
        }
        opt._ascended = [target.parameter for target in targets]
        opt._ascent.measure(opt._pending)
        opt._guard.forget_ascent()
        opt._written.forget_ascent()
        opt._progress.ascents += 1

    # ------------------------------------------------------------ where it can't be had

    def _knows_modules(self) -> bool:
        return self._modules is not None and self._structure is self._opt._structure_now()

    def _refuse(self, reason: str, why: str = "", for_good: bool = True) -> None:
        self._refused |= for_good
        if reason not in self._told:
            self._told.add(reason)
            how = "from now on every step takes" if for_good else "such a step is followed by one of"
            warnings.warn(
                f"one_pass() can't tell the samples apart, since the model {reason}; {how} two passes"
                f"{f' ({why})' if why else ''}.",
                stacklevel=2,
            )


def _of_a_copy(loss: Loss, part: Any) -> Tensor:
    """The loss, which may take entries out of a batch that it is given several times."""
    return loss(copy.copy(part) if isinstance(part, Mapping | list) else part)


def _iterations(lmo: LMO) -> int:
    return lmo.power_iterations if isinstance(lmo, Nuclear) else 1


def _unfit(
    structure: Structure | None, parameter: Tensor, verdict: Verdict | None, compiles: bool
) -> tuple[str, str] | None:
    """Why the layers of a target can't serve it, with {} for its name; nothing if they can."""
    if structure is None or not structure.uses_of(parameter):
        return "has no layer that is known to hold {}", ""
    if compiles and not _is_served_in_a_graph(structure, parameter, verdict):
        return "is compiled", "a graph does not hand out what {} leaves"
    if verdict and verdict.found == OTHERWISE:
        return "uses {} otherwise than by its layer", ""
    return None


def _is_served_in_a_graph(structure: Structure, parameter: Tensor, verdict: Verdict | None) -> bool:
    """Whether a compiled graph hands out the products of a matrix: those of one use by a layer of its own."""
    (use, *more) = structure.uses_of(parameter)
    several = bool(more) or (verdict is not None and verdict.found == SEVERAL_USES)
    return not several and not isinstance(use.module, nn.MultiheadAttention)


def _run(part: Any, loss: Loss, backward: Backward) -> Tensor:
    """Forward and backward of one batch; its loss."""
    value = checked(loss(part))
    backward(value)
    return value.detach()
