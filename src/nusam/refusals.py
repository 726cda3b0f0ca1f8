"""What is refused before a pass, and what is held against what after it."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import BESIDE, OTHERWISE
from nusam.both_gradients import BothGradients
from nusam.distributed.blocks import is_sharded
from nusam.distributed.data_parallel import DataParallel, is_running
from nusam.distributed.surroundings import Holders
from nusam.guards.checks import check_both, check_join, check_share, check_surroundings, check_tracking
from nusam.guards.engine_checks import check_no_engine
from nusam.guards.weights import check_formed, check_own, check_parameter, check_sharded
from nusam.layers.kinds import held
from nusam.lmo import Nuclear
from nusam.overlaps import running
from nusam.placement.ledger import Counted, Ledger, not_added
from nusam.placement.written_weights import WrittenWeights
from nusam.placing import Placing
from nusam.targets import Target
from nusam.wrapper import Adjustable

__all__ = ["CHANGED", "OTHERWISE_USED", "WRITTEN", "Checked", "Unreachable"]


OTHERWISE_USED = (
    "was used otherwise than in the steps in which it was compared with its gradient, and was not perturbed in this "
    "step; its gradient is formed from now on"
)
CHANGED = (
    "has its gradient changed by the loop inside the passes, or leads it to another backward, and had none in this "
    "step's ascent; use ascent='gradient'"
)
UNREACHED = (
    "is frozen, got no gradient in the ascent and has no ε as long as that is so; exclude it with targets= where its "
    "layer is never called, or the model reads it as weight.data"
)
ALL_UNREACHED = (
    "are frozen, got no gradient in the ascent and have no ε as long as that is so; exclude them with targets= where "
    "their layers are never called, or the model reads them as weight.data"
)
WRITTEN = "written in the passes themselves"


class Unreachable(RuntimeError):
    """An ε in the forward would not be all of ε.

    Args:
        what: is why.
        instead: how to have it otherwise.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.what = what
        super().__init__(
            f"{what}, where an ε in the forward can't reach it; exclude it with targets= or use {instead}."
        )


class Checked(Placing):
    """An optimizer that refuses what it can't serve, and holds what had a gradient against what had an ε."""

    ascent_share: Adjustable[float] = Adjustable(check_share)
    _ledger: Ledger
    _written: WrittenWeights
    _holders: Holders
    _both: BothGradients
    _instead = "placement='weights'"  # of an ε in the forward
    _is_carried = False  # whether this ε came with the step before
    _told_rounding = False  # whether a dense ε in weights below float32 was told of
    _join: tuple[object, ...] = ()  # of the last pass, see DataParallel.join
    _overlaps = False  # whether another optimizer was inside a pass in those since the last step
    _left: Callable[[], None] | None = None  # what is due of a descent whose loop was left before its end
    _without_epsilon = 0  # looks one after the other at which every ε was 0

    def _is_looked_at(self) -> bool:
        """Whether the ascent that begins is one that is watched closely: the first, and 2, 4, 8, … steps after it."""
        if self._first_ascent is None:
            self._first_ascent = self._progress.steps
        age = self._progress.steps - self._first_ascent
        return age != 1 and age & (age - 1) == 0

    def _warn_of_no_epsilon(self) -> None:
        """Of a share whose loss has no gradient; one such look may be due to a scaler that seeks its scale."""
        norms = [values["epsilon"] for values in self._ascent.measured.values()]
        self._without_epsilon = 0 if any(bool(norm.any()) for norm in norms) else self._without_epsilon + bool(norms)
        if self._without_epsilon == 2:
            warnings.warn(
                f"The ascent's share of the batch, ascent_share={self.ascent_share:g}, leaves every ε at 0, so that "
                "the base optimizer trains alone; a loss among samples needs several of them, take a larger share.",
                stacklevel=2,
            )

    def _check_targets(self) -> None:
        """Refuse what can't be perturbed, before anything is."""
        targets = self._targets(factor=1.0)
        workers = self._workers()
        self._holders.forget()
        check_surroundings(self._parameters(), self.model, self.lmo, workers, self._holders)
        self._check_own(targets)
        self._holders.forget()  # wrappers may come later
        structure = self._structure_now()
        uses = {workers.stored(use.parameter) for use in structure.uses} if structure else set()
        for parameter in (target.parameter for target in targets):
            serves = self._apart or self._ascent.serve_from is not None
            check_parameter(parameter, self.lmo, self.placement, parameter in uses, self.direction, serves)
            if is_sharded(parameter):
                own = self._in_forward(parameter) and self._ascent.serve_from is not None
                check_sharded(parameter, self.lmo, self.model, self.m_sam, workers, own)
        self._check_memory(targets)

    def _check_memory(self, targets: list[Target], anew: bool = False) -> None:
        """Refuse an ε in the forward of one parameter whose entries are those of another one too; looked for anew?"""
        if anew and self._structure is not None:
            self._structure.look_for_shared_memory()
        sharing = self._structure.sharing if self._structure else {}
        for parameter in (target.parameter for target in targets if target.parameter in sharing):
            if self._in_forward(parameter):
                names = self._names()
                raise ValueError(
                    f"{names[parameter]} and {names[sharing[parameter]]} are two parameters with the same memory, of "
                    "which an ε in the forward reaches one alone; make them one, as decoder.weight = encoder.weight "
                    f"does, exclude them with targets= or use {self._instead}."
                )

    def _targets_of_pass(self) -> list[Target]:
        """What the pass that begins perturbs, or is found to perturb; refused if that can't be had as things are."""
        check_both(type(self).__name__, self.combination, self.ascent_share)
        targets = self._targets()
        known = self._target_list
        if known is not None and not known.is_checked:
            self._check_precision(targets)
            self._check_own(targets)
            known.is_checked = True
        if self._is_looked_at():
            self._check_memory(targets, anew=True)
        return targets

    def _check_formed(self, targets: list[Target], pass_: LayerPass | None) -> None:
        """Refuse what the ascent that begins finds no gradient of."""
        known = {*(pass_.records if pass_ else ()), *self._ascent.unreachable}
        unserved = [target.parameter for target in targets if target.parameter not in known]
        check_formed(unserved, self._ascent.fallbacks, self._names)

    def _check_own(self, targets: list[Target]) -> None:
        """Refuse parameters of this process alone where the processes must agree on more: wrappers may have come."""
        if self.m_sam is True or not is_running() or dist.get_world_size() == 1:
            return
        workers, joint, everything = self._workers(), self.lmo.joint, self._parameters()
        is_own = workers.is_own
        if joint and not (workers.replicates or workers.shards):
            is_own = self._holders.replicated(everything).is_own
        mixed = everything if joint and self.combination is not None else []  # by one factor
        check_own([*(target.parameter for target in targets), *mixed], self.lmo, is_own)

    def _check_ascent(self, pass_: LayerPass) -> None:
        """Refuse an ascent without a backward, where it takes one, or after which a descent would step twice.

        And tell of frozen targets that the first one did not reach: nothing else does.
        """
        pass_.check_backwards()
        if self._unreached is None:
            self._unreached = set(pass_.unreached())
            names = self._names() if self._unreached else {}
            thawed = {p for p, record in pass_.records.items() if record.thaws}
            trained = {p: name for p, name in names.items() if p.requires_grad and p not in thawed}
            told = [p for p in pass_.records if p in self._unreached and not _is_replaced(p, names[p], trained)]
            self._ledger.tell(told, self._names, ALL_UNREACHED if len(told) > 1 else UNREACHED)
        elif self._unreached:
            self._unreached &= set(pass_.unreached())
        if self._in_backward is not None:
            names, several = self._names(), self._ascent.in_several_backwards(pass_)
            self._in_backward.refuse_several([names[parameter] for parameter in several])

    def _check_precision(self, targets: list[Target]) -> None:
        """Refuse, or tell of once, an ε that would be rounded away: the weights may have been cast at any time."""
        if self.placement != "auto":
            return
        low = [target.parameter for target in targets if held(target.parameter).dtype.itemsize < 4]
        for parameter in low if isinstance(self.lmo, Nuclear) and self.model is None else []:
            check_parameter(parameter, self.lmo, self.placement, False, self.direction)
        if low and not isinstance(self.lmo, Nuclear) and not self._told_rounding:
            self._told_rounding = True
            warnings.warn(
                f"{type(self).__name__} adds its ε to weights in {low[0].dtype}, which rounds much of it away; keep "
                "the weights in float32 and use autocast, use nusam.NuSAM with model=, whose ε lives in the forward, "
                "or accept the rounding with placement='weights'.",
                stacklevel=2,
            )

    def _check_anything_to_perturb(self) -> None:
        """Refuse an optimizer that would never perturb anything, unless its radii say so; later it may come to that."""
        radii = [group.get("rho", self._rho) for group in self.param_groups]
        radii += [] if self.targets == "trainable" else [self._rho]
        if self._targets(factor=1.0) or not any(rho > 0 for rho in radii):
            return
        raise ValueError(
            f"{self._name} has nothing to perturb: "
            f"{'the model' if self.targets != 'trainable' or self._apart else 'the optimizer'} holds no "
            f"{self.targets if isinstance(self.targets, str) else 'targeted'} {self._target}; "
            "hand it such parameters, or choose another method."
        )

    def _check_processes(self, workers: DataParallel) -> None:
        """Refuse what can't be run among the processes as they are now, before a pass begins."""
        check_tracking()
        if is_running():
            mixes = self.combination is not None
            check_surroundings(self._parameters(), self.model, self.lmo, workers, self._holders, mixes)
            self._check_no_engine()
        workers.refuse_unreduced()
        if workers.joins:
            check_join(self._progress.steps < self.delay, self.rho_schedule)
            if self._join != workers.join and workers.splits_the_batch:
                self._ascent.states.clear()  # some processes took fewer steps, and remember less
            self._join = workers.join

    def _check_no_engine(self) -> None:
        """Refuse an optimizer that an engine has taken, and steps."""
        if not self._apart:
            check_no_engine(self._parameters(), self._workers(), self._holders, self)

    def _refuse_unreachable(self, parameters: list[Tensor], reasons: dict[Tensor, str]) -> None:
        """Refuse an ε in the forward where it would not be all of ε."""
        for parameter in parameters:
            verdict = self._ascent.verification.found.get(parameter)
            reason = reasons.get(parameter)
            if verdict and verdict.found == OTHERWISE:
                reason = verdict.reason
            if self._written.writes(parameter):
                reason = WRITTEN
            if reason:
                raise self._unreachable(parameter, reason)

    def _refuse_written(self, forward: Mapping[Tensor, Any]) -> None:
        """Refuse a descent whose loop wrote weights with an ε in the forward."""
        for parameter, handler in forward.items():
            if handler.is_written():
                raise self._unreachable(parameter, WRITTEN)

    def _begin_among_others(self, accumulate: bool) -> list[Any]:
        """A pass begins; the optimizers that are inside one themselves."""
        others = running(self)
        for opt in (self, *others) if others else ():
            opt._overlaps = True
        if not (accumulate and any(parameter.grad is not None for parameter in self._parameters())):
            self._left, self._both.are_apart = None, False
        return others

    @contextmanager
    def _closed_by_the_step(self, close: Callable[[], None]) -> Iterator[None]:
        """Inside is the descent's loop; one that is left before its end may step all the same."""
        try:
            yield
        except BaseException:
            self._left = close
            raise

    def _close_left(self) -> None:
        """End the descent that a loop has left before its end, if the step takes its gradients all the same."""
        left, self._left = self._left, None
        overlaps, self._overlaps = self._overlaps, False
        spent = self._in_backward is not None
        if left is not None and (spent or any(parameter.grad is not None for parameter in self._parameters())):
            if self._both.are_apart:
                raise RuntimeError(
                    f"The loop left the descent of {type(self).__name__} before its end, where both gradients are "
                    "mixed; let the passes run to their end before step(), or clear the gradients."
                )
            left()
        elif overlaps and (left is not None or self._pending is not None):
            raise RuntimeError(
                f"{type(self).__name__} has had no backward in its descent, since optimizers that run together had "
                "unequal numbers of passes; give all of them the same delay and radii above 0, and zip() strict=True."
            )

    def _unreachable(self, parameter: Tensor, reason: str) -> Unreachable:
        if reason == BESIDE and self._holders.of(self._parameters(), stages=True, replicas=False):
            reason += ", or scaled by its pipeline, whose schedule then needs scale_grads=False"
        return Unreachable(f"{self._names()[parameter]} is {reason}", self._instead)

    def _close_ledger(self, forward: Mapping[Tensor, Counted]) -> None:
        """Hold what got a gradient in the descent against what had an ε there."""
        stepped = self._in_backward.stepped if self._in_backward else set()
        passed_over = self._ledger.close(stepped, self._names, self._is_carried)
        workers = self._workers()
        alone = not (workers.replicates or workers.shards)
        if alone and any(self._ascent.verification.of(parameter) is None for parameter in passed_over):
            self._ascent.verification.ask()
        missed = not_added(forward) if alone else []  # gradients come from elsewhere too
        if missed and self._structure is not None:  # graphs add without counting
            in_graphs = self._ascent.in_graphs | self._structure.in_graphs()
            missed = [parameter for parameter in missed if parameter not in in_graphs]
        for parameter in missed:
            self._ascent.measured.pop(parameter, None)
        used = [p for p in missed if p.grad is not None or p in stepped]
        self._ascent.verification.refuse(dict.fromkeys(used, "not reached by its ε in the forward"))
        self._ledger.tell(used, self._names, "got a gradient in the descent, where no layer added its perturbation; "
                          f"exclude it with targets= or use {self._instead}")  # fmt: skip


def _is_replaced(frozen: Tensor, name: str, trained: Mapping[Tensor, str]) -> bool:
    """Whether a trained copy stands beside it, as beside what adapters keep of a layer that they train instead."""
    parent, *layer = name.rsplit(".", 2)
    beside = [p for p, other in trained.items() if other.startswith(f"{parent}.")] if len(layer) == 2 else []
    return any(p.shape == frozen.shape for p in beside)
