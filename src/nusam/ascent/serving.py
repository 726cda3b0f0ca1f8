"""Which matrices an ascent takes from their layers, and what its passes teach about them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nusam.ascent.findings import Job
from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import BESIDE, IN_A_GRAPH, ONE_USE, OTHERWISE, SEVERAL_USES, Verification, compared
from nusam.distributed.blocks import compute_device
from nusam.distributed.data_parallel import DataParallel
from nusam.interrupts import entered
from nusam.layers.structure import HOOKED, Structure
from nusam.lmo import LMO, Nuclear, State, matrix_shape
from nusam.targets import Target

__all__ = ["Serving", "full_precision"]

OVERWRITTEN = "the input of its layer is overwritten"
KERNEL_ROWS = 64  # of a kernel in a group, from which one filter's products are cheaper than the gradient of all
LARGE = 2**26  # entries of all matrices from which a gradient that was formed to be compared does not stay


class Remembers(Protocol):
    """Has a state for every parameter."""

    def init_state(self, parameter: Tensor) -> State:
        """Before the first step."""
        ...


class _Count(NamedTuple):
    """What a device was asked about matrices, and when it has answered."""

    parameters: list[Tensor]
    differ: Tensor
    event: torch.Event


class Serving:
    """Decides what is served by its layer, and remembers what was found.

    Args:
        lmo: the norm ball.
        serve_from: entries from which a matrix is served by its layer; None if none is.
        remembers: what else has a state for every parameter.
        apart: whether the parameters themselves take part in no backward.
    """

    def __init__(
        self, lmo: LMO, serve_from: int | None, remembers: Sequence[Remembers] = (), apart: bool = False
    ) -> None:
        self.lmo = lmo
        self.apart = apart
        self.stacks: set[Tensor] = set()  # parameters that are a matrix for each expert
        self._remembers = remembers
        self.serve_from = serve_from
        self.states: dict[Tensor, State] = {}
        self.verification = Verification()
        self._fell_back: dict[Tensor, str] = {}  # in the last pass
        self.unreachable: dict[Tensor, str] = {}  # by an ε in the forward in this step, and why
        self._whole: set[Tensor] = set()  # whose gradient comes in several backwards, and is not freed between them
        self._overwritten: set[Tensor] = set()  # whose layers' inputs are, before their backward
        self._counts: list[_Count] = []
        self._groups: dict[Tensor, int] = {}  # of each matrix, as its layer uses it
        self.compiles = False  # whether compiled graphs were seen
        self.in_graphs: set[Tensor] = set()  # what graphs were seen to use
        self.sees_calls = True  # whether all that was compared was called where Python sees it, in no compiled graph

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_counts": [], "_groups": {}}

    def state_of(self, target: Target) -> State:
        """What is remembered of the target, its warm start above all."""
        state = self.states.get(target.parameter)
        if state is None:
            state = self.states[target.parameter] = self.fresh_state(target.parameter, target.seed)
        return state

    def fresh_state(self, parameter: Tensor, seed: int) -> State:
        """What is remembered of a parameter before its first ascent."""
        if parameter in self.stacks:
            return {"u": torch.stack([self.lmo.init_state(M, seed ^ e)["u"] for e, M in enumerate(parameter.detach())])}
        state = self.lmo.init_state(parameter, seed)
        for other in self._remembers:
            state |= other.init_state(parameter)
        return state

    def fit_states(self) -> None:
        """Let states follow parameters that were cast or moved; those of parameters that were grown start anew."""
        for parameter, state in list(self.states.items()):
            like = self.fresh_state(parameter, 0)
            if {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in like.items()}:
                self.states[parameter] = {name: x.to(like[name].device, like[name].dtype) for name, x in state.items()}
            else:
                del self.states[parameter]

    def copied_states(self) -> dict[Tensor, State]:
        """What is remembered now."""
        return {parameter: dict(state) for parameter, state in self.states.items()}

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
        parameters: Sequence[Tensor] = (),
    ) -> LayerPass | None:
        """The pass that takes the layers' products, if there is any to take.

        Args:
            structure: where the model uses the matrices.
            targets: what is perturbed in this step.
            in_forward: those whose ε is to live in the forward.
            workers: the processes that share the pass.
            frees: whether a gradient that is formed to be compared goes as soon as it has been.
            parameters: all that a backward may reach.
        """
        self.unreachable = {}
        if structure is None or not isinstance(self.lmo, Nuclear) or not targets:
            return None
        if self.serve_from is None and not in_forward:
            return None
        self._groups = structure.groups
        self.verification.watch(structure.modes())
        worth, others = [], []
        for target in targets:
            if self.serve_from is not None and self._is_worth(target.parameter):
                worth.append(target)
            elif target.parameter in in_forward:
                others.append(target)
        concerned = worth + others
        reasons = {} if self.apart else structure.why_not_served([target.parameter for target in concerned])
        if workers.must_reduce:
            workers.refuse_frozen([target.parameter for target in targets])
            reasons = {target.parameter: workers.why_it_must_reduce for target in concerned}
        why_not = reasons | self.verification.reasons
        self._fell_back = {t.parameter: why_not[t.parameter] for t in worth if t.parameter in why_not}
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
        # What a process learned by itself, or of its own, must not decide whether it joins in what all do together.
        deciding = [*jobs, *(serves if workers.splits_the_batch else ())]
        if all(map(workers.is_own, deciding)):
            return None
        due = self.verification.is_due()
        checks = any(job.checks for job in jobs.values())
        needed = {target.parameter for target in targets}
        compiles = self.compiles or checks
        return LayerPass(
            structure.uses,
            jobs,
            self.lmo.power_iterations,
            compiles,
            structure.idle,
            needed,
            due,
            parameters,
            self.sees_calls,
        )

    def _is_worth(self, parameter: Tensor) -> bool:
        least = self.serve_from
        if not least or not parameter.requires_grad:
            return least is not None
        if parameter.ndim == 2:
            return matrix_shape(parameter).numel() >= least
        # a kernel is multiplied with many more rows than there are samples
        return parameter.numel() >= least / 8 and parameter.shape[0] // self._groups.get(parameter, 1) >= KERNEL_ROWS

    def _job(self, target: Target, serves: bool, in_forward: bool, keeps: bool, frees: bool) -> Job | None:
        """What a pass is to do for a matrix; nothing if its gradient is formed as if nobody watched."""
        parameter = target.parameter
        found = self.verification.of(parameter)
        known = found in (ONE_USE, SEVERAL_USES)
        frozen = self.apart or not parameter.requires_grad
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        comparable = not frozen or ((self.apart or not keeps) and plain)
        checks = comparable and (found is None or (known and self.verification.is_due()))
        several = frozen and found in (SEVERAL_USES, OTHERWISE)  # other uses leave their part of the sum beside it
        served = serves and (found == ONE_USE or several or not comparable or (keeps and found == SEVERAL_USES))
        if not checks and not served and not (in_forward and known and not keeps) and not self.apart:
            return None
        forms = not served and not checks
        frees = (frees or frozen) and not keeps and not several and parameter not in self._whole
        kept = keeps or several
        copies = parameter in self._overwritten
        state, apart = self.state_of(target), self.apart
        return Job(state, known, checks, forms, kept, keeps, frees, in_forward, copies, apart, serves)

    # ------------------------------------------------------------ after the pass

    @torch.no_grad()
    def compare(self, pass_: LayerPass, workers: DataParallel, everyone: DataParallel) -> None:
        """Learn from what a pass has checked; waits for the device if anything was."""
        self.compiles |= pass_.is_compiled
        self.in_graphs |= {parameter for parameter, record in pass_.records.items() if record.probed is not None}
        checked = [record for record in pass_.records.values() if record.job.checks]
        self.sees_calls &= not self.compiles and all(record.calls or not record.completed for record in checked)
        if checked:
            with full_precision(record.parameter for record in checked):
                self.verification.learn(compared(checked, workers, everyone))
            reasons = self.verification.reasons
            served = [r.parameter for r in pass_.records.values() if self._is_worth(r.parameter)]
            self._fell_back |= {p: r for p in served if (r := reasons.get(p))}

    def in_several_backwards(self, pass_: LayerPass) -> list[Tensor]:
        """Matrices that were seen to get parts of their gradient one after the other."""
        return [p for p, record in pass_.records.items() if max(record.completed, record.sums.count) > 1]

    def surprises(self, pass_: LayerPass) -> dict[Tensor, str]:
        """Matrices that were served though this step used them otherwise than the steps that were compared."""
        reasons = {}
        for parameter, record in pass_.records.items():
            in_a_graph = record.job.forms and self.compiles  # where its own uses form it in the parameter too
            if record.is_overwritten:
                reasons[parameter] = OVERWRITTEN
            elif record.count_differs():
                reasons[parameter] = IN_A_GRAPH
            elif record.is_lost():
                reasons[parameter] = f"used {max(record.takes, record.calls, record.completed)} times"
            elif record.has_more and (record.has_pair or (record.job.in_forward and not in_a_graph)):
                reasons[parameter] = BESIDE
        return reasons

    def looked_for(self, pass_: LayerPass) -> list[Tensor]:
        """Matrices that the pass left without a gradient, where the loop looked for one."""
        return [p for p, record in pass_.records.items() if record.looks.seen and record.leaves_none]

    def see_looks(self, pass_: LayerPass) -> None:
        """A loop that looks at gradients where they are compared relies on them: let it have them from now on."""
        looked_at = pass_.note_looks()
        if looked_at:
            self.verification.leave_gradients(looked_at, "looked at")
            served = [parameter for parameter in looked_at if self._is_worth(parameter)]
            self._fell_back |= {p: r for p in served if (r := self.verification.reasons.get(p))}

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
            if reason == OVERWRITTEN:
                self._overwritten.add(parameter)
            if pass_.records[parameter].frozen:
                self.verification.serve_by_sum(parameter, reason)
            else:
                self.verification.forget(parameter)
        self._fell_back |= reasons


def full_precision(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Whatever autocast surrounds the passes."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    kinds = {d.type for p in parameters for d in (p.device, compute_device(p))}
    return entered(*(torch.autocast(kind, enabled=False) for kind in kinds - {"meta"}))
