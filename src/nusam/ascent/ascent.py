"""The ascent: from one pass over a sample to ε of every target, and what is remembered from step to step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.parts import part_of, shared_part
from nusam.ascent.record import Job, Record
from nusam.ascent.verification import IN_A_GRAPH, ONE_USE, SEVERAL_USES, Verification, compared
from nusam.distributed.blocks import complete, compute_device, is_sharded, local, route
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Ranks
from nusam.interrupts import entered
from nusam.layers.structure import HOOKED, Structure
from nusam.lmo import L2, LMO, Nuclear, Perturbation, RankOne, State, matrix_shape
from nusam.power_iteration import Matrix, TopPair, power_iteration
from nusam.targets import Target

__all__ = ["Ascent"]

LARGE = 2**26  # entries of all matrices from which a gradient that was formed to be compared does not stay


class _Count(NamedTuple):
    """What a device was asked about matrices, and when it has answered."""

    parameters: list[Tensor]
    differ: Tensor
    event: torch.Event


class Ascent:
    """Finds ε by the weights' gradients, or from their layers.

    Args:
        lmo: the norm ball.
        serve_from: entries from which a matrix is served by its layer; None if none is.
    """

    def __init__(self, lmo: LMO, serve_from: int | None) -> None:
        self.lmo = lmo
        self.serve_from = serve_from
        self.states: dict[Tensor, State] = {}
        self.measured: dict[Tensor, dict[str, Tensor]] = {}
        self.verification = Verification()
        self._fell_back: dict[Tensor, str] = {}  # in the last pass
        self.unreachable: dict[Tensor, str] = {}  # by an ε in the forward in this step, and why
        self._whole: set[Tensor] = set()  # whose gradient comes in several backwards, and is not freed between them
        self._counts: list[_Count] = []
        self.compiles = False  # whether compiled graphs were seen
        self.sees_calls = True  # whether all that was compared was called where Python sees it, in no compiled graph

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_counts": []}

    def state_of(self, target: Target) -> State:
        """What is remembered of the target, its warm start above all."""
        if target.parameter not in self.states:
            self.states[target.parameter] = self.lmo.init_state(target.parameter, target.seed)
        return self.states[target.parameter]

    @property
    def fallbacks(self) -> dict[Tensor, str]:
        """Matrices that their layer could not serve, and why."""
        return dict(self._fell_back) if self.serve_from is not None else {}

    # ------------------------------------------------------------ before the pass

    def prepare(
        self,
        structure: Structure | None,
        targets: Sequence[Target],
        in_forward: set[Tensor],
        workers: DataParallel,
        frees: bool,
    ) -> LayerPass | None:
        """The pass that takes the layers' products, if there is any to take.

        Args:
            structure: where the model uses the matrices.
            targets: what is perturbed in this step.
            in_forward: those whose ε is to live in the forward.
            workers: the processes that share the pass.
            frees: whether a gradient that is formed to be compared goes as soon as it has been.
        """
        self.unreachable = {}
        if structure is None or not isinstance(self.lmo, Nuclear) or not targets:
            return None
        if self.serve_from is None and not in_forward:
            return None
        self.verification.watch(structure.modes())
        worth = [t for t in targets if self._is_worth(t.parameter)] if self.serve_from is not None else []
        concerned = worth + [t for t in targets if t.parameter in in_forward and not self._is_worth(t.parameter)]
        reasons = structure.why_not_served([target.parameter for target in concerned])
        if workers.must_reduce:
            workers.refuse_frozen([target.parameter for target in targets])
            reasons = {target.parameter: workers.why_it_must_reduce for target in concerned}
        self._fell_back = {t.parameter: reasons[t.parameter] for t in worth if t.parameter in reasons}
        found_otherwise = self.verification.reasons
        self._fell_back |= {t.parameter: r for t in worth if (r := found_otherwise.get(t.parameter))}
        if workers.must_reduce:
            return None
        frees |= sum(t.parameter.numel() for t in concerned) >= LARGE
        keeps = workers.splits_the_batch or any(workers.is_tensor_parallel(t.parameter) for t in targets)
        self.unreachable = {p: HOOKED for p in in_forward if reasons.get(p) == HOOKED}
        serves = {target.parameter for target in worth if target.parameter not in reasons}
        jobs = {}
        watched = in_forward - self.unreachable.keys()
        for target in concerned:
            if target.parameter in serves or (target.parameter in watched and structure.uses_of(target.parameter)):
                is_in_forward = target.parameter in in_forward
                job = self._job(target, target.parameter in serves, is_in_forward, keeps, frees)
                if job is not None:
                    jobs[target.parameter] = job
        # What a process learned by itself must not decide whether it takes part in what all do together.
        if not (jobs or (serves and workers.splits_the_batch)):
            return None
        due = self.verification.is_due()
        checks = any(job.checks for job in jobs.values())
        needed = {target.parameter for target in targets}
        compiles = self.compiles or checks
        return LayerPass(structure.uses, jobs, self.lmo.power_iterations, compiles, structure.idle, needed, due)

    def _is_worth(self, parameter: Tensor) -> bool:
        least = self.serve_from
        return least is not None and (matrix_shape(parameter).numel() >= least or not parameter.requires_grad)

    def _job(self, target: Target, serves: bool, in_forward: bool, keeps: bool, frees: bool) -> Job | None:
        """What a pass is to do for a matrix; nothing if its gradient is formed as if nobody watched."""
        parameter = target.parameter
        found = self.verification.of(parameter)
        known = found in (ONE_USE, SEVERAL_USES)
        frozen = not parameter.requires_grad
        comparable = not frozen or (not keeps and type(parameter) is nn.Parameter and parameter.is_floating_point())
        checks = comparable and (found is None or (known and self.verification.is_due()))
        several = frozen and found == SEVERAL_USES
        served = serves and (found == ONE_USE or several or not comparable or (keeps and found == SEVERAL_USES))
        if not checks and not served and not (in_forward and known and not keeps):
            return None
        forms = not served and not checks
        frees = (frees or frozen) and not keeps and not several and parameter not in self._whole
        return Job(self.state_of(target), known, checks, forms, keeps or several, keeps, frees, in_forward)

    # ------------------------------------------------------------ after the pass

    @torch.no_grad()
    def compare(self, pass_: LayerPass, workers: DataParallel, everyone: DataParallel) -> None:
        """Learn from what a pass has checked; waits for the device if anything was."""
        self.compiles |= pass_.is_compiled
        checked = [record for record in pass_.records.values() if record.job.checks]
        self.sees_calls &= not self.compiles and all(record.calls or not record.completed for record in checked)
        if checked:
            with _full_precision(record.parameter for record in checked):
                self.verification.learn(compared(checked, workers, everyone))
            reasons = self.verification.reasons
            served = [r.parameter for r in pass_.records.values() if self._is_worth(r.parameter)]
            self._fell_back |= {p: r for p in served if (r := reasons.get(p))}

    def surprises(self, pass_: LayerPass) -> dict[Tensor, str]:
        """Matrices that were served though this step used them otherwise than the steps that were compared."""
        reasons = {}
        for parameter, record in pass_.records.items():
            in_a_graph = record.job.forms and self.compiles  # where its own uses form it in the parameter too
            if record.count_differs():
                reasons[parameter] = IN_A_GRAPH
            elif record.is_lost():
                reasons[parameter] = f"used {max(record.takes, record.calls, record.completed)} times"
            elif record.has_more and (record.pair is not None or (record.job.in_forward and not in_a_graph)):
                reasons[parameter] = "also used outside its layer"
        return reasons

    def learn_late(self) -> list[Tensor]:
        """Matrices of which a device has counted other uses in an earlier step than it was to; never waits for it."""
        late = []
        while self._counts and self._counts[0].event.query():
            parameters, differ, _ = self._counts.pop(0)
            late += [p for p, differs in zip(parameters, differ.tolist(), strict=True) if differs]
        for parameter in late:
            self.verification.forget(parameter)
        return late

    def _count_late(self, pass_: LayerPass) -> None:
        """Let the device tell in a later step how often compiled graphs have used what they served."""
        counted = [r for r in pass_.records.values() if r.is_served_in_a_graph and r.u.device.type != "cpu"]
        for device in {record.u.device for record in counted}:
            here = [record for record in counted if record.u.device == device]
            differ = torch.stack([record.count().reshape(()) for record in here]) != 1
            event = torch.Event(device)
            self._counts.append(_Count([r.parameter for r in here], differ.to("cpu", non_blocking=True), event))
            event.record()

    def mistrust(self, pass_: LayerPass, reasons: dict[Tensor, str]) -> None:
        """Compare these anew before they are served again; those that have no gradient by the sum over their uses."""
        for parameter, reason in reasons.items():
            self._whole.add(parameter)
            if pass_.records[parameter].frozen:
                self.verification.serve_by_sum(parameter, reason)
            else:
                self.verification.forget(parameter)
        self._fell_back |= reasons

    @torch.no_grad()
    def perturbations(
        self, targets: Sequence[Target], pass_: LayerPass | None, seed: int, workers: DataParallel
    ) -> dict[Tensor, Perturbation]:
        """ε of every target that the pass reached.

        Args:
            targets: what to perturb.
            pass_: the pass that served some of them without a gradient; the others have theirs in ``grad``.
            seed: for balls that draw.
            workers: the processes that share the pass.
        """
        if pass_ is not None and pass_.is_compiled:
            self._count_late(pass_)
        in_summands = workers.splits_the_batch and not workers.reduces_gradients(pass_ is not None)
        whole_pairs = pass_ is not None and not pass_.keeps
        sharded = any(is_sharded(target.parameter) for target in targets)
        with _full_precision(target.parameter for target in targets):
            if in_summands and not isinstance(self.lmo, Nuclear):
                workers.average([target.parameter for target in targets])
                in_summands = False
            if in_summands or (sharded and not whole_pairs):
                found = self._from_parts(targets, pass_, workers, in_summands)
            else:
                found = self._from_here(targets, pass_, seed, sharded)
        self.measure(found)
        return found

    def measure(self, found: Mapping[Tensor, Perturbation]) -> None:
        """What the metrics say of a step's ε."""
        self.measured = {
            parameter: {"sigma": perturbation.sigma, "epsilon": perturbation.norm}
            if isinstance(perturbation, RankOne)
            else {"epsilon": perturbation.norm}
            for parameter, perturbation in found.items()
        }

    @contextmanager
    def only_compared(self) -> Iterator[None]:
        """Inside, an ascent is run for its comparisons: nothing else of it is remembered."""
        states, measured = {parameter: dict(state) for parameter, state in self.states.items()}, self.measured
        try:
            yield
        finally:
            self.states, self.measured = states, measured

    def _trusts(self, record: Record | None, *found: str) -> bool:
        """Whether what its layers found counts: always where served, where compared if it was known before too."""
        if record is None or not record.job.checks:
            return True
        return record.job.known and self.verification.of(record.parameter) in (found or (ONE_USE, SEVERAL_USES))

    def _from_here(
        self, targets: Sequence[Target], pass_: LayerPass | None, seed: int, sharded: bool
    ) -> dict[Tensor, Perturbation]:
        """All that is needed is in this process."""
        lmo = self.lmo
        if pass_ is None:
            reached = [target for target in targets if target.parameter.grad is not None]
            dense = [cast(Tensor, target.parameter.grad) for target in reached]
            states, radii = [self.state_of(target) for target in reached], [target.radius for target in reached]
            perturbations = lmo(dense, radii, states, seed) if reached else []
            return {target.parameter: epsilon for target, epsilon in zip(reached, perturbations, strict=True)}
        lmo = cast(Nuclear, lmo)
        records = pass_.records
        found: dict[Tensor, TopPair] = {}
        trusted = [p for p, r in records.items() if r.once and not r.job.keeps and self._trusts(r, ONE_USE)]
        if sharded:  # m-SAM: gradients are averaged over processes, the layers' pairs are this one's
            trusted = [p for p, r in records.items() if r.once and self.verification.of(p) in (ONE_USE, None)]
        found |= pass_.top_pairs(trusted)
        found |= {p: r.gradient_pair for p, r in records.items() if p not in found and r.gradient_pair is not None}
        gradients: dict[Tensor, Tensor | Matrix] = {}
        for target in targets:
            parameter = target.parameter
            record = records.get(parameter)
            gradient = part_of(parameter, record, self._trusts(record))
            if parameter not in found and gradient is not None:
                gradients[parameter] = gradient
        reached = [t for t in targets if t.parameter in found or t.parameter in gradients]
        if not reached:
            return {}
        if sharded and gradients:
            raise RuntimeError(
                "m_sam=True under FSDP2 needs every perturbed matrix to be served by its layer, and the gradient "
                f"of one of shape {tuple(next(iter(gradients)).shape)} was formed, which FSDP2 averages; exclude it "
                "with targets=, or use m_sam=False."
            )
        states = [self.state_of(target) for target in reached]
        radii = [target.radius for target in reached]
        us = [self.states[p]["u"] for p in gradients]
        iterated = power_iteration(list(gradients.values()), us, lmo.power_iterations)
        found |= dict(zip(gradients, iterated, strict=True))
        perturbations = lmo.from_pairs([found[target.parameter] for target in reached], radii, states)
        return {target.parameter: epsilon for target, epsilon in zip(reached, perturbations, strict=True)}

    def _from_parts(
        self, targets: Sequence[Target], pass_: LayerPass | None, workers: DataParallel, in_summands: bool
    ) -> dict[Tensor, Perturbation]:
        """Processes hold blocks or summands, and all of them go through the same list of targets.

        A gradient that is missing here may be there elsewhere, so it counts as zeros.
        """
        states = [self.state_of(target) for target in targets]
        radii = [target.radius for target in targets]
        gradients: list[Tensor | Matrix]
        if isinstance(self.lmo, Nuclear):
            records = pass_.records if pass_ else {}
            parts = []
            for parameter in (target.parameter for target in targets):
                record = records.get(parameter)
                parts.append(shared_part(parameter, record, self._trusts(record), workers, in_summands))
            gradients, routes = [matrix for matrix, _ in parts], [route_ for _, route_ in parts]
        else:
            shards = [complete(target.parameter.grad, target.parameter) for target in targets]
            gradients, routes = [local(gradient) for gradient in shards], [route(gradient) for gradient in shards]
        lmo = cast(L2 | Nuclear, self.lmo)  # those that see shards
        perturbations = lmo(gradients, radii, states, 0, Ranks(routes))  # type: ignore[arg-type]
        return {target.parameter: epsilon for target, epsilon in zip(targets, perturbations, strict=True)}


def _full_precision(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Whatever autocast surrounds the passes."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    kinds = {d.type for p in parameters for d in (p.device, compute_device(p))}
    return entered(*(torch.autocast(kind, enabled=False) for kind in kinds - {"meta"}))
