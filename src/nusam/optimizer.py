"""Sharpness-aware minimization over any norm ball, around any PyTorch optimizer (Algorithm 1, eq. (6)).

One object in storeys, a file each: ``wrapper`` (the base optimizer's own), ``targets``, ``resuming`` (state),
``placing`` (where ε lives), ``refusals`` (checks), ``two_passes`` (ascent and descent), ``stepping`` (the loop).
"""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.ascent.ascent import Ascent
from nusam.base_optimizer import needs_closure
from nusam.both_gradients import BothGradients
from nusam.combinations import Combination
from nusam.directions import Direction
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.surroundings import Holders
from nusam.guards.calls import check_loop
from nusam.guards.checks import (
    check_base_optimizer,
    check_both,
    check_closure,
    check_model,
    check_options,
    check_radius,
    check_served,
    check_steps,
)
from nusam.guards.model_guard import ModelGuard
from nusam.layers.reads import Backwards
from nusam.layers.structure import Structure
from nusam.lmo import LMO, Epsilon, Nuclear, RankOne
from nusam.one_pass.fitting import check_fits
from nusam.one_pass.neighbours import looked_ahead
from nusam.one_pass.one_pass import OnePass
from nusam.placement.ledger import Ledger
from nusam.placement.step_in_backward import StepInBackward
from nusam.placement.written_weights import WrittenWeights
from nusam.stepping import Stepping
from nusam.targets import Progress, Targets
from nusam.wrapper import itself

__all__ = ["Options", "SharpnessAware"]

WORTH_SERVING = 2**16  # entries of a matrix from which a matrix-free ascent is faster than its gradient


class Options(TypedDict, total=False):
    """Arguments that every method of :class:`SharpnessAware` takes."""

    delay: int
    rho_schedule: Callable[[int], float] | None
    model: nn.Module | None
    targets: Targets
    ascent: str
    placement: str
    m_sam: Any
    ascent_share: float
    seed: int


class SharpnessAware(Stepping):
    """SAM over the norm ball of ``lmo`` around ``base_optimizer``.

    A step draws one sample ξ, computes the gradient at the weights (ascent), moves them to x + ε with
    ε = argmax_{‖ε‖≤ρ} ⟨ε, ∇f(x, ξ)⟩, computes the gradient there (descent), moves back, and lets the base
    optimizer step with the second gradient (eq. (6))::

        for x, y in loader:
            for _ in opt.passes():
                loss = criterion(model(x), y)
                loss.backward()
            opt.step()

    or, with torch's closure contract, ``opt.step(closure)``. It is a :class:`torch.optim.Optimizer` itself:
    ``param_groups``, ``state``, hyperparameters and schedules are the base optimizer's own.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        lmo: the norm ball, see :mod:`nusam.lmo`.
        rho: radius ρ ≥ 0 of the ball, in the units of the weights; the default of the param-group key
            ``"rho"``. A group with ρ = 0 is never perturbed.
        delay: steps taken by the base optimizer alone before the perturbation starts. The paper delays by
            10% of training (§5.1.1).
        rho_schedule: maps the number of steps taken to a factor ≥ 0 on ρ, e.g. ``lambda k: (k + 1) ** -0.5``
            (Theorem 4.6).
        model: the module being trained. With it, every buffer (running statistics of batch norm, codebooks,
            queues) moves once per step, as the ascent moves it, both passes see the same dropout mask, and saving,
            copying or evaluating the model inside the descent pass raises. Without it, buffers move twice, masks
            differ, and the descent pass is yours to respect.
        targets: which parameters are perturbed, as far as the ball selects them: ``"trainable"``, those that the
            optimizer holds; ``"frozen"``, the model's parameters that need no gradient, such as the base weights
            under LoRA; or a predicate ``(name, parameter) -> bool`` over the model's parameters. The latter two
            need ``model=`` and a rank-one ball. Parameters outside the optimizer are perturbed by ``rho``.
        ascent: ``"gradient"`` computes ε from the weights' gradients; ``"matrix-free"`` from each layer's input and
            output gradient, so that the ascent forms no gradient of a weight, bias or norm (rank-one balls, needs
            ``model=``; a matrix that no layer can serve falls back to its gradient, see :meth:`metrics`).
            ``"auto"`` is matrix-free where it can be and pays: for matrices of at least 65,536 entries, and kernels
            of at least 8,192 with 64 rows in a group. Below that the gradient is computed faster than it is avoided
            (measured on a CPU, ``benchmarks/breakeven.py``).
        placement: ``"weights"`` adds ε to the weights and takes it back; ``"forward"`` adds ρ(x·v)uᵀ to each layer's
            output and writes no weight (rank-one balls, needs ``model=``). ``"auto"`` is ``"forward"`` where the
            weight is below float32 or frozen, else ``"weights"``.
        m_sam: whether every process has an ε of its own, computed from its own share of the batch without any
            communication (Algorithm 3); or the process group that shares one (under DistributedDataParallel). False
            is one ε for all. Needs ``model=`` to be the wrapped module.
        ascent_share: the share of each batch that the ascent sees, in (0, 1]: the first ⌈share·B⌉ of its B samples.
            1 is the paper's algorithm; less is a cheaper one, see ``docs/cheap.md``. Below 1 the batch goes through
            :meth:`passes`, and the buffers of the model are those that the descent leaves, which sees all of it.
        seed: of the warm starts and of Gaussian noise. The global generators are never drawn from.
        direction: what ε is made of instead of the gradient, see :mod:`nusam.directions`.
        combination: what the descent makes of both gradients, see :mod:`nusam.combinations`.

    Raises:
        TypeError, ValueError, NotImplementedError: in one sentence, before anything is changed.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        lmo: LMO,
        rho: float = 0.05,
        *,
        delay: int = 0,
        rho_schedule: Callable[[int], float] | None = None,
        model: nn.Module | None = None,
        targets: Targets = "trainable",
        ascent: str = "auto",
        placement: str = "auto",
        m_sam: Any = False,
        ascent_share: float = 1.0,
        seed: int = 0,
        direction: Direction | None = None,
        combination: Combination | None = None,
    ) -> None:
        check_base_optimizer(base_optimizer)
        for group in base_optimizer.param_groups:
            check_radius(group.get("rho", rho))
        check_options(lmo, delay, rho_schedule, model, targets, ascent, placement, m_sam, ascent_share, seed)
        check_steps(lmo, direction, combination, m_sam)
        check_both(type(self).__name__, combination, ascent_share)

        # Optimizer.__init__ fills fresh groups and state; ours are the base optimizer's, so a stand-in takes them.
        stand_in = SimpleNamespace(add_param_group=lambda group: None, defaults={})
        vars(self)["base_optimizer"] = stand_in
        defaults = {**base_optimizer.defaults, "rho": rho}
        super().__init__([{"params": group["params"]} for group in base_optimizer.param_groups], defaults)
        vars(self)["base_optimizer"] = base_optimizer

        self.lmo = lmo
        self.direction = direction or Direction()
        self.combination = combination
        self.delay = int(delay)
        self.rho_schedule = rho_schedule
        self._model = model
        self.targets = targets
        self.placement = placement
        self.seed = int(seed)
        self.m_sam = m_sam
        self.ascent_share = float(ascent_share)
        serves = ascent != "gradient" and model is not None and isinstance(lmo, Nuclear)
        everything = ascent == "matrix-free" or (m_sam is not False and DataParallel(model).shards)
        remembers = [combination] if combination else []
        serve_from = (0 if everything else WORTH_SERVING) if serves else None
        self._ascent = Ascent(lmo, serve_from, direction, remembers, self._apart)
        self._both = BothGradients(combination)
        self._stacks = self._ascent.stacks
        self._pending: dict[Tensor, Epsilon] | None = None
        self._in_backward: StepInBackward | None = None
        self._guard = ModelGuard(model)
        self._written = WrittenWeights()
        self._ledger = Ledger()
        self._backwards = Backwards()
        self._structure: Structure | None = None
        self._ascended: list[Tensor] = []  # the targets of the ascent that the next descent belongs to
        self._progress = Progress()
        self._holders = Holders()
        self._target_list = None
        self._one_pass: OnePass | None = None
        self._waiting: dict[Tensor, RankOne] | None = None  # ε of the next step, for radii of 1
        if not self._apart:
            check_model(model, self._parameters())
        self._check_targets()
        self._check_anything_to_perturb()
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)
        self._watch_progress()

    def one_pass(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        *,
        backward: Callable[[Tensor], Any] | None = None,
        accumulate: bool = False,
    ) -> Iterator[Tensor]:
        """Iterate over the batches with one forward and one backward each: the next step's ascent rides along.

        The first ``ascent_share`` of the next batch's samples travel behind those of this batch, without ε, and give
        the next step's ε. So ε is one update old when it is used, which the paper's algorithm is not::

            def loss(batch):
                x, y = batch
                return criterion(model(x), y)

            for value in opt.one_pass(loader, loss):
                opt.step()

        The first perturbed step, and one after the end of ``batches``, has no ε waiting and takes an ascent of its
        own; the very first takes two passes. So does every step, after one warning, where the model does not tell
        samples apart: batch norm, experts with a capacity, weights that are used outside of their layers. From then
        on ``ascent="auto"`` is matrix-free for matrices of every size, in :meth:`passes` too.

        Args:
            batches: of the run, or of an epoch; looked ahead by one.
            loss: of one batch, a tensor with one value. It is called for the samples behind too, in a thread of its
                own that never runs beside the caller's.
            backward: runs a loss backwards, such as ``accelerator.backward``; ``torch.Tensor.backward`` unless given.
            accumulate: whether gradients of micro-batches add up, each perturbed by what the one before it carried.

        Yields:
            The loss of a batch at the perturbed weights, with its gradients in place.

        Raises:
            ValueError: for a ball that is not nuclear, without ``model=``, with ``ascent="gradient"`` or
                ``placement="weights"``, or after :func:`step_in_backward`.
        """
        self = itself(self)
        one_pass = self._begin_one_pass()
        check_loop(batches, loss)
        for batch, following in looked_ahead(one_pass.loops.ahead_in(batches)):
            yield one_pass.step(batch, following, loss, backward or Tensor.backward, accumulate)

    def _begin_one_pass(self) -> OnePass:
        """What steps of :meth:`one_pass` are taken by, for loops that look ahead by themselves."""
        self._refuse_inside_pass("one_pass()")
        check_closure(self.base_optimizer, needs_closure(self.base_optimizer))
        check_served("one_pass()", self.lmo, self.model)
        check_fits(self._ascent.serve_from is not None, self.placement, self._in_backward is not None)
        self._ascent.serve_from = 0
        self._looks_ahead = True
        if self._one_pass is None:
            self._one_pass = OnePass(self)
        return self._one_pass

    def metrics(self) -> dict[str, float]:
        """Flat numbers for any logger. Waits for the device.

        ``active`` (of the next step) and ``rho`` (the largest radius of the groups, after the schedule); for
        each parameter of the last ascent ``epsilon/NAME``, ‖ε‖_F, and for rank-one perturbations
        ``sigma/NAME``, the estimate of its gradient's top singular value, times the loss scale if a scaler was
        at work. ``fallback/NAME: REASON`` is 1 for a matrix that a matrix-free ascent could not serve, and whose
        gradient was formed instead (or summed over its uses, if it is frozen). Names are the model's where
        ``model=`` was given, else the optimizer's own, else GROUP.INDEX.
        """
        names = self._names()
        measured = {
            f"{kind}/{names[parameter]}": value
            for parameter, values in self._ascent.measured.items()
            for kind, value in values.items()
        }
        device = next(iter(measured.values())).device if measured else None
        tensors = [value.to(device, torch.float32) for value in measured.values()]
        values = torch.stack(tensors).tolist() if tensors else []
        return {
            "active": float(self.active),
            "rho": max(self._radii()),
            **dict(zip(measured, values, strict=True)),
            **{f"fallback/{names[parameter]}: {reason}": 1.0 for parameter, reason in self._ascent.fallbacks.items()},
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own ``"rho"`` if it names one."""
        self._refuse_inside_pass("add_param_group()")
        self.base_optimizer.add_param_group(param_group)
        groups = self.param_groups
        if not groups:  # while Optimizer.__init__ runs, on the stand-in
            return
        try:
            check_radius(groups[-1].setdefault("rho", self._rho))
            self._check_targets()
            self._ascent.verification.ask()
        except Exception:
            groups.pop()
            raise
