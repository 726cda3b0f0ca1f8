"""Sharpness-aware minimization over any norm ball, around any PyTorch optimizer (Algorithm 1, eq. (6))."""

import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from operator import is_
from types import SimpleNamespace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.ascent.ascent import Ascent, Target
from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.verification import OTHERWISE
from nusam.base_optimizer import needs_closure, step_knowing, turns_round
from nusam.batch import first_samples
from nusam.distributed.blocks import is_sharded
from nusam.distributed.data_parallel import DataParallel, unwrapped
from nusam.distributed.surroundings import Holders
from nusam.guards.checks import (
    check_alone,
    check_base_optimizer,
    check_batch,
    check_choice,
    check_closure,
    check_count,
    check_frozen,
    check_join,
    check_m_sam,
    check_parameter,
    check_radius,
    check_served,
    check_sharded,
    check_share,
    check_surroundings,
)
from nusam.guards.model_guard import ModelGuard
from nusam.interrupts import always
from nusam.layers.kinds import Handler
from nusam.layers.reads import Backwards, watched
from nusam.layers.structure import Structure
from nusam.layers.uses import rerouted
from nusam.lmo import LMO, Nuclear, Perturbation, RankOne, State, matrix_shape
from nusam.one_pass.apart import Apart
from nusam.one_pass.one_pass import OnePass, Riders, looked_ahead
from nusam.placement.in_forward import InForward
from nusam.placement.ledger import Ledger, clear_gradients, not_added
from nusam.placement.step_in_backward import StepInBackward
from nusam.placement.written_weights import WrittenWeights
from nusam.saving import load_base, merge, own_containers, split
from nusam.targets import Candidate, Coverage, covered, warn_of_small_reach
from nusam.wrapper import Wrapper, itself

__all__ = ["Options", "SharpnessAware", "step_in_backward"]

AHEAD = "ahead"  # in the state of a matrix: v of the ε that waits for the next step, its σ and its norm
WORTH_SERVING = 2**16  # entries of a matrix from which a matrix-free ascent is faster than its gradient

OTHERWISE_USED = (
    "was used otherwise than in the steps in which it was compared with its gradient, and was not perturbed in this "
    "step; its gradient is formed from now on"
)
WRITTEN = "written in the passes themselves"

Targets = str | Callable[[str, nn.Parameter], bool]


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


class SharpnessAware(Wrapper):
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
            ``"auto"`` is matrix-free where it can be and pays: for matrices of at least 65,536 entries. Below that
            the gradient is computed faster than it is avoided (measured on a CPU, ``benchmarks/breakeven.py``).
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

    Raises:
        TypeError, ValueError, NotImplementedError: in one sentence, before anything is changed.
    """

    _pass: str | None = None  # the pass that is running
    _had_pass = False  # whether a descent pass ran since the last step
    _may_repeat = False  # whether a step's loop would come back for another ascent
    _repeats = False  # and whether it must
    _in_scaler = False  # whether a GradScaler has asked, as it does before it calls step()
    _join: tuple[object, ...] = ()  # of the last pass, see DataParallel.join
    _few_by_design = False  # whether the method is meant to reach few of the entries

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
    ) -> None:
        check_base_optimizer(base_optimizer)
        if not isinstance(lmo, LMO):
            raise TypeError(f"lmo must be a norm ball from nusam.lmo, such as nusam.lmo.Nuclear(), got {lmo!r}.")
        for group in base_optimizer.param_groups:
            check_radius(group.get("rho", rho))
        check_count("delay", delay)
        check_count("seed", seed)
        check_share(ascent_share)
        if rho_schedule is not None and not callable(rho_schedule):
            raise TypeError(f"rho_schedule must map a step to a factor on rho, or be None, got {rho_schedule!r}.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module being trained, or None, got {type(model).__name__}.")
        if not callable(targets):
            check_choice("targets", targets, ("trainable", "frozen"))
        check_choice("ascent", ascent, ("auto", "gradient", "matrix-free"))
        check_choice("placement", placement, ("auto", "weights", "forward"))
        check_m_sam(m_sam, lmo, DataParallel(model, m_sam))
        if targets == "frozen":
            check_served("targets='frozen'", lmo, model)
            check_frozen(ascent, DataParallel(model))
        elif targets != "trainable" and model is None:
            raise ValueError("A predicate for targets needs model= for the names; pass the module being trained.")
        if ascent == "matrix-free":
            check_served("ascent='matrix-free'", lmo, model)
        if placement == "forward":
            check_served("placement='forward'", lmo, model)

        # Optimizer.__init__ fills fresh groups and state; ours are the base optimizer's, so a stand-in takes them.
        stand_in = SimpleNamespace(add_param_group=lambda group: None, defaults={})
        self.base_optimizer: Optimizer = cast(Optimizer, stand_in)
        defaults = {**base_optimizer.defaults, "rho": rho}
        super().__init__([{"params": group["params"]} for group in base_optimizer.param_groups], defaults)
        self.base_optimizer = base_optimizer

        self.lmo = lmo
        self.delay = delay
        self.rho_schedule = rho_schedule
        self.model = model
        self.targets = targets
        self.placement = placement
        self.seed = seed
        self.m_sam = m_sam
        self.ascent_share = float(ascent_share)
        serves = ascent != "gradient" and model is not None and isinstance(lmo, Nuclear)
        everything = ascent == "matrix-free" or (m_sam is not False and DataParallel(model).shards)
        self._ascent = Ascent(lmo, (0 if everything else WORTH_SERVING) if serves else None)
        self._pending: dict[Tensor, Perturbation] | None = None
        self._in_backward: StepInBackward | None = None
        self._guard = ModelGuard(model, self.ascent_share == 1)
        self._written = WrittenWeights()
        self._first_ascent: int | None = None  # the step of it, since the start or the last load
        self._ledger = Ledger()
        self._backwards = Backwards()
        self._structure: Structure | None = None
        self._ascended: list[Tensor] = []  # the targets of the ascent that the next descent belongs to
        self._progress = _Progress()
        self._holders = Holders()
        self._target_list: _TargetList | None = None
        self._one_pass: OnePass | None = None
        self._waiting: dict[Tensor, RankOne] | None = None  # ε of the next step, for radii of 1
        self._check_targets()
        self._check_anything_to_perturb()
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)
        self._watch_progress()

    # ---------------------------------------------------------------- the two passes

    def passes(self, *batch: Any, accumulate: bool = False) -> Iterator[Any]:
        """Iterate over the passes of one step: the ascent, then the descent; only the latter while inactive.

        The loop body computes the loss and calls ``backward``. Each pass starts with cleared gradients; with
        ``accumulate=True`` the descent gradient adds to what is there, and the ascent leaves no trace in it:
        every micro-batch gets its own perturbation. However the loop is left, the weights are the unperturbed
        ones afterwards; a loop left in the ascent leaves no gradient of it behind.

        The ascent comes twice in a step that turns out to use a matrix otherwise than the steps did in which its
        layer was compared with its gradient: the second time its gradient is formed.

        Args:
            batch: what comes back once a pass: several arguments as a tuple, one (a tensor, dictionary, dataclass,
                list, ...) as itself. In the ascent it is cut to ``ascent_share`` of its samples, see
                :func:`nusam.batch.first_samples`. Without any, ``"ascent"`` and ``"descent"`` come.
            accumulate: whether gradients of micro-batches add up.

        Raises:
            RuntimeError: inside another pass, or if a pass computed no gradient at all.
            ValueError: if ``rho_schedule`` or a group's ``rho`` gave something else than a finite number ≥ 0, or if
                there is no batch that could be cut though ``ascent_share`` is below 1.
        """
        self = _itself(self)
        check_batch(batch, self.ascent_share)
        whole: Any = batch[0] if len(batch) == 1 else batch or "descent"
        part: Any = whole if batch else "ascent"
        if self.ascent_share < 1 and self.active:
            part = first_samples(whole, self.ascent_share)
        with closing(self._passes(accumulate)) as names:
            for name in names:
                yield part if name == "ascent" else whole

    def _passes(self, accumulate: bool) -> Generator[str, None, None]:
        """The passes by name, for loops that cut the batch themselves."""
        check_closure(self.base_optimizer, needs_closure(self.base_optimizer) and not self._has_closure)
        if self.active:
            self._may_repeat = True
            try:
                with self.ascent(accumulate):
                    yield "ascent"
                if self._repeats:
                    self._guard.rewind()
                    with self.ascent(accumulate):
                        yield "ascent"
            finally:
                self._may_repeat = self._repeats = False
        with self.descent(accumulate):
            yield "descent"

    @contextmanager
    def ascent(self, accumulate: bool = False) -> Iterator[None]:
        """The first half of :meth:`passes`, for loops whose passes live in different functions.

        On leaving, ε is computed from the gradients, and these are put away. While :attr:`active` is False
        there is nothing to gain from running it.
        """
        self = _itself(self)
        self._refuse_inside_pass("ascent()")
        targets = self._targets() if self.active else []
        workers = self._workers()
        self._check_processes(workers)
        workers.reshard()
        parameters = self._parameters()
        serves = self.model is not None and isinstance(self.lmo, Nuclear)
        in_forward = {target.parameter for target in targets if self._in_forward(target.parameter)} if serves else set()
        frees = self._in_backward is not None
        self._ledger.tell(self._ascent.learn_late(), self._names, OTHERWISE_USED)
        pass_ = self._ascent.prepare(self._structure_now(), targets, in_forward, workers, frees)
        reduces = workers.reduces_gradients(pass_ is not None)
        kept = [workers.kept(parameter.grad) if accumulate else None for parameter in parameters]
        if self._first_ascent is None:
            self._first_ascent = self._progress.steps
        age = self._progress.steps - self._first_ascent
        check = age != 1 and age & (age - 1) == 0  # the first, and 2, 4, 8, … steps after it

        def undo() -> None:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
            if pass_:
                pass_.release()
            self._pass = None

        self._pending = self._waiting = None
        self._repeats = False
        with always(undo), workers.ascent(reduces), pass_.running() if pass_ else nullcontext():
            self._pass = "ascent"
            self._in_scaler = False  # a step that the scaler skipped is over
            clear_gradients(parameters)
            self._ledger.begin_pass()
            self._guard.before_ascent(check)
            self._written.before_ascent({*parameters, *(t.parameter for t in targets)}, check, self._guard.tree)
            with self._backwards.of_ascent() if in_forward else nullcontext():
                yield
            self._guard.after_ascent()
            self._written.after_ascent()
            if pass_:
                pass_.settle()
            reached = bool(pass_ and pass_.saw_gradients())
            self._ledger.end_pass("ascent", reached or any(p.grad is not None for p in parameters), self._has_closure)
            self._ascended = [target.parameter for target in targets]
            self._pending = self._perturb(targets, pass_, workers, in_forward)

    @contextmanager
    def descent(self, accumulate: bool = False) -> Iterator[None]:
        """The second half of :meth:`passes`: inside, the weights are x + ε; afterwards x again."""
        with _itself(self)._descent(accumulate):
            yield

    @contextmanager
    def _descent(self, accumulate: bool = False, riders: Riders | None = None) -> Iterator[None]:
        """With samples of the next step's ascent behind those of the batch, if there are any."""
        self._refuse_inside_pass("descent()")
        if self._in_backward and accumulate:
            raise RuntimeError("accumulate=True needs gradients that step_in_backward() frees; use one or the other.")
        if self._pending is None and self.active:
            raise RuntimeError(
                "descent() was entered without a perturbation; run 'with opt.ascent():' on the same sample first, "
                "or loop over opt.passes()."
            )
        if self._pending is None:  # none came before, or it was refused
            self._ascended = []
            self._guard.forget_ascent()
            self._written.forget_ascent()
        perturbations = self._pending or {}
        pairs = {p: e for p, e in perturbations.items() if isinstance(e, RankOne) and self._in_forward(p)}
        forward: dict[Tensor, Apart] | dict[Tensor, InForward]
        if riders is None:
            forward = {p: InForward(epsilon.u, epsilon.v, self._backwards.is_over) for p, epsilon in pairs.items()}
        else:
            forward = riders.of(pairs)
        in_place = [p for p in perturbations if p not in pairs]
        # processes with perturbations of their own would drift apart by the rounding of a subtraction
        bit_exact = self.m_sam is not False
        others = [] if self._in_backward else self._parameters()  # those are written by the base optimizer
        epsilons = [perturbations[parameter] for parameter in in_place]
        workers = self._workers()
        self._check_processes(workers)
        workers.reshard()  # layers are known by what they hold then
        structure = self._structure_now()
        unknown: set[Tensor] = set()
        if structure is not None and self._written.checks:
            unknown = {p for p in in_place if not (is_sharded(p) or structure.uses_of(p))}
        perturbed = self._written.in_weights(in_place, epsilons, bit_exact, unknown, others)
        del epsilons

        def undo() -> None:
            perturbed.remove()
            if in_place:
                workers.reshard()
            self._pass = None
            self._ascended = []

        # ε goes first: what the guard leaves then may be a weight whose copy was restored
        with always(undo), ExitStack() as guards, always(perturbed.remove):
            self._pass = "descent"
            self._in_scaler = False
            if not accumulate:
                clear_gradients(self._parameters())
            self._ledger.begin_pass()
            self._ledger.open(self._ascended, perturbations)
            guards.enter_context(self._guard.descent(bool(perturbations)))
            if forward and structure is not None:
                handlers: dict[Tensor, Handler] = {**forward}
                guards.enter_context(rerouted(structure.uses, handlers))
            if self._in_backward:
                guards.enter_context(self._in_backward.running())
            self._pending = None
            self._had_pass = True
            del perturbations
            perturbed.add()
            if in_place:
                workers.reshard()
            # what a compiled graph does with a weight looks as if somebody read it
            watch = watched(forward) if self._ascent.sees_calls else nullcontext()
            with self._backwards.of_descent() if forward else nullcontext(), watch:
                yield
            for parameter, handler in forward.items():
                if handler.is_written():
                    raise self._unreachable(parameter, WRITTEN)
            self._written.after_descent(self._names)
            if not accumulate and not self._in_backward:
                found = any(p.grad is not None for p in self._parameters())
                self._ledger.end_pass("descent", found, self._has_closure)
            self._close_ledger({parameter: forward[parameter] for parameter in pairs})

    # ---------------------------------------------------------------- one pass

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
        samples apart: batch norm, experts with a capacity, weights that are used outside of their layers.

        Args:
            batches: of the run, or of an epoch; looked ahead by one.
            loss: of one batch, a tensor with one value. It is called for the samples behind too, in a thread of its
                own that never runs beside the caller's.
            backward: runs a loss backwards, such as ``accelerator.backward``; ``torch.Tensor.backward`` unless given.
            accumulate: whether gradients of micro-batches add up, each perturbed by what the one before it carried.

        Yields:
            The loss of a batch at the perturbed weights, with its gradients in place.

        Raises:
            ValueError: for a ball that is not nuclear, without ``model=``, with ``placement="weights"``, or after
                :func:`step_in_backward`.
        """
        self = _itself(self)
        self._refuse_inside_pass("one_pass()")
        check_closure(self.base_optimizer, needs_closure(self.base_optimizer))
        check_served("one_pass()", self.lmo, self.model)
        if self.placement == "weights" or self._in_backward is not None:
            given = "placement='weights'" if self._in_backward is None else "step_in_backward()"
            raise ValueError(
                f"one_pass() needs an ε in the forward and gradients that stay, which {given} does not leave; leave it "
                "out, or loop over opt.passes(*batch)."
            )
        self._ascent.serve_from = 0
        if self._one_pass is None:
            self._one_pass = OnePass(self)
        for batch, following in looked_ahead(batches):
            yield self._one_pass.step(batch, following, loss, backward or Tensor.backward, accumulate)

    @contextmanager
    def _all_in_forward(self) -> Iterator[None]:
        """Inside, every ε lives in the forward."""
        before, self.placement = self.placement, "forward"

        def undo() -> None:
            self.placement = before

        with always(undo):
            yield

    def _had_ascent(self, waiting: dict[Tensor, RankOne]) -> None:
        """The next descent perturbs by what an earlier pass has found, for radii of 1."""
        targets = self._targets()
        found = [(t.parameter, abs(t.radius), waiting[t.parameter]) for t in targets if t.parameter in waiting]
        radii = [radius for _, radius, _ in found]
        vs, norms = [epsilon.v for _, _, epsilon in found], [epsilon.norm for _, _, epsilon in found]
        if found:
            vs, norms = list(torch._foreach_mul(vs, radii)), list(torch._foreach_mul(norms, radii))
        self._pending = {
            parameter: RankOne(epsilon.u, v, epsilon.sigma, norm)
            for (parameter, _, epsilon), v, norm in zip(found, vs, norms, strict=True)
        }
        self._ascended = [target.parameter for target in targets]
        self._ascent.measure(self._pending)
        self._guard.forget_ascent()
        self._written.forget_ascent()
        self._progress.ascents += 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step with the gradients that are there.

        Args:
            closure: runs one pass ([zero_grad,] forward, backward) and returns the loss. With it, ``step``
                first runs the passes itself, and returns the loss at the unperturbed weights, which the base
                optimizer's own ``step`` may read too.

        Raises:
            RuntimeError: inside a pass, if a GradScaler hands over a closure, or if the base optimizer needs one.
        """
        losses, self._given_losses = list(self._given_losses), ()
        self._refuse_inside_pass("step()")
        in_scaler, self._in_scaler = self._in_scaler, False
        if closure is not None and in_scaler:
            raise RuntimeError(
                "A GradScaler called step() with a closure, whose gradients it would not unscale; run the passes "
                "yourself, 'for _ in opt.passes(): scaler.scale(loss).backward()', and step without a closure."
            )
        has_loss = closure is not None or bool(losses)
        check_closure(self.base_optimizer, not has_loss and needs_closure(self.base_optimizer))
        if closure is not None:
            losses = self._losses_of(closure)
        self._pending = None
        if self._in_backward is None:
            if losses:
                self._step_base_knowing(losses[0])
            else:
                self.base_optimizer.step()
        if self._had_pass or not self._stands_still():
            self._progress.steps += 1
            self._progress.wanted |= self._is_wanted()
        self._had_pass = False
        if self._progress.ascents and not self._progress.told_reach:
            self._progress.told_reach = True
            if not self._few_by_design:
                warn_of_small_reach(self._candidates(), self._perturbs, self._what_it_perturbs)
        return losses[0] if losses else None

    def _losses_of(self, closure: Callable[[], Any]) -> list[Any]:
        """What the closure returns in each pass; an ascent that is run again does not count."""
        if self.ascent_share < 1:
            raise ValueError(
                f"step(closure) would run the whole batch in both passes, though ascent_share={self.ascent_share:g}; "
                "loop over opt.passes(*batch) and call step() without a closure, or use ascent_share=1."
            )
        losses = []
        with self._in_closure():
            for _ in self.passes():
                with torch.enable_grad():
                    losses.append(closure())
        return losses[-2:]

    def _step_base_knowing(self, loss: Any) -> None:
        kind = type(self.base_optimizer)
        copies = not self._took_a_closure and not kind.__module__.startswith("torch.optim.")
        step_knowing(self.base_optimizer, loss, copies)
        self._took_a_closure = True

    def _is_wanted(self) -> bool:
        return any(group["rho"] > 0 for group in self.param_groups)

    def _stands_still(self) -> bool:
        """Whether no step moves anything: torch.distributed.checkpoint takes one such to make empty state."""
        return all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does it."""
        self.base_optimizer.zero_grad(set_to_none)

    # ---------------------------------------------------------------- what can be asked

    @property
    def active(self) -> bool:
        """Whether the next step is perturbed: the delay is over and some group's radius is positive."""
        return self._progress.steps >= self.delay and any(radius > 0 for radius in self._radii())

    def perturbation_numel(self) -> int:
        """Floats that ε needs: Σ(n+m) over the matrices for νSAM (Table 1), every perturbed weight for SAM."""
        return sum(self.lmo.numel(target.parameter) for target in self._targets(factor=1.0))

    def coverage(self) -> Coverage:
        """How many trainable entries are perturbed, once the delay is over, and by name what is not.

        Counts the entries of the model, or without ``model=`` of the optimizer, that are trainable; with
        ``targets="frozen"`` those that are frozen. Names are those of :meth:`metrics`.
        """
        return covered(self._candidates(), self._names(), self._perturbs, self._what_it_perturbs, self.targets)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for any logger; the only call that waits for the device.

        ``active`` (of the next step) and ``rho`` (the largest radius of the groups, after the schedule); for
        each parameter of the last ascent ``epsilon/NAME``, ‖ε‖_F, and for rank-one perturbations
        ``sigma/NAME``, the estimate of its gradient's top singular value, times the loss scale if a scaler was
        at work. ``fallback/NAME: REASON`` is 1 for a matrix that a matrix-free ascent could not serve, and whose
        gradient was formed instead (or which was not perturbed, if it has none). Names are the model's where
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

    def detach(self) -> None:
        """Let go of the model for good: the ascent computes gradients, nothing of the model is guarded.

        Between passes the model carries no trace of the optimizer anyway, except the hooks of
        :func:`step_in_backward`, which are removed.

        Raises:
            RuntimeError: inside a pass, or if parameters outside the optimizer are perturbed.
        """
        self = _itself(self)
        self._refuse_inside_pass("detach()")
        sharded = any(is_sharded(parameter) for parameter in self._parameters())
        if self.targets != "trainable" or self.placement == "forward" or self.m_sam is not False or sharded:
            raise RuntimeError(
                "detach() would leave targets, placement, m_sam or sharded parameters without the model they need; "
                "build an optimizer with targets='trainable', placement='auto' and m_sam=False instead."
            )
        if self._in_backward is not None:
            self._in_backward.remove()
        self._in_backward = self.model = self._ascent.serve_from = None
        self._guard = ModelGuard(None)

    # ---------------------------------------------------------------- what makes it an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with a key ``"rho"``."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def _step_supports_amp_scaling(self) -> bool:  # asked by GradScaler.step
        if self._in_backward is not None:
            raise RuntimeError(
                "A GradScaler can't unscale gradients that step_in_backward() has spent already; use bfloat16 without "
                "a scaler, or leave step_in_backward() out."
            )
        self._in_scaler = True
        return False

    @property
    def state(self) -> Any:
        """The base optimizer's state, exactly as it would be alone."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

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
        except Exception:
            groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with our warm starts among the entries of each parameter."""
        self._refuse_inside_pass("state_dict()")
        self._progress.warn_if_never_perturbed()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        states = self._states_to_save()
        outside = {name: states[p] for name, p in self._outside().items() if p in states}
        names = {parameter: name for name, parameter in self._outside().items()}
        found = {names.get(p, p): code for p, code in self._ascent.verification.codes()}
        served = found if self.model is not None and isinstance(self.lmo, Nuclear) else None
        base = self.base_optimizer.state_dict()
        saved = merge(base, self.param_groups, states, outside, self._progress.steps, served)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or one that the base optimizer saved alone.

        Raises:
            ValueError: if it does not fit the parameters; nothing is loaded then.
        """
        self._refuse_inside_pass("load_state_dict()")
        state_dict = own_containers(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved = split(state_dict, self.param_groups)
        outside = self._outside()
        found = saved.states | {outside[name]: state for name, state in saved.outside.items() if name in outside}
        states = {p: self._checked_state(p, state) for p, state in found.items() if self._perturbs(p)}
        rhos = [group["rho"] for group in self.param_groups]
        load_base(self.base_optimizer, saved.base)
        for group, rho, saved_rho in zip(self.param_groups, rhos, saved.rhos, strict=True):
            group.setdefault("rho", rho)
            if saved_rho is not None:
                group["rho"] = saved_rho
        self._ascent.states, self._ascent.measured, self._pending = states, {}, None
        self._ascent.verification.load({outside.get(key, key): code for key, code in saved.found.items()})
        self._progress.steps, self._progress.ascents = saved.steps, max(0, saved.steps - self.delay)
        self._first_ascent = None
        self._waiting = self._saved_ahead({p: state for p, state in found.items() if p in states})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_pass("copying or pickling the optimizer")
        if self._in_backward is not None:
            raise RuntimeError(
                "An optimizer with step_in_backward() can't be copied or pickled; save its state_dict()."
            )
        left_out = ("step", "_hook_for_profile")
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        kept = {name: value for name, value in state.items() if name not in left_out}
        return {**kept, "_pending": None, "_structure": None, "_ascended": [], "_target_list": None, "_one_pass": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_progress()

    # ---------------------------------------------------------------- behind the passes

    @property
    def _target(self) -> str:
        return self.lmo.target

    @property
    def _what_it_perturbs(self) -> str:
        return f"{type(self).__name__} perturbs a {self._target}"

    def _perturbs(self, parameter: Tensor) -> bool:
        return self.lmo.selects(parameter)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _radii(self) -> list[float]:
        """ρ of every group at this step: its own times the schedule's factor."""
        factor = self._factor()
        for group in self.param_groups:
            check_radius(group["rho"])
        return [float(group["rho"]) * factor for group in self.param_groups]

    def _factor(self) -> float:
        factor = 1.0 if self.rho_schedule is None else self.rho_schedule(self._progress.steps)
        check_radius(factor, f"rho_schedule({self._progress.steps})")
        return float(factor)

    def _outside(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer does not hold, by name, if they may be perturbed."""
        if self.targets == "trainable" or self.model is None:
            return {}
        held = set(self._parameters())
        stored = self._workers().stored
        named = {name: stored(parameter) for name, parameter in unwrapped(self.model).named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter not in held}

    def _targets(self, factor: float | None = None) -> list[Target]:
        """What is perturbed in this step, by how much, and the seed of its state.

        A radius is negative where the base optimizer maximizes: the worst neighbour is then the lowest.
        """
        factor = self._factor() if factor is None else factor
        known = self._target_list
        if known is None or callable(self.targets) or not known.holds(self, factor):
            chosen = [
                Target(parameter, radius * factor, _mix(self.seed, index))
                for index, (parameter, radius, left_out) in enumerate(self._candidates())
                if radius * factor != 0 and left_out is None and self._perturbs(parameter)
            ]
            self._target_list = known = _TargetList(self, factor, chosen)
        return known.targets

    def _candidates(self) -> list[Candidate]:
        """Every parameter that the optimizer holds, and those beside it that may be perturbed."""
        groups, turned = self.param_groups, turns_round(self.base_optimizer)
        signs = [-1.0 if turned != bool(group.get("maximize", False)) else 1.0 for group in groups]
        everything = [
            (parameter, group.get("rho", self._rho), sign)
            for group, sign in zip(groups, signs, strict=True)
            for parameter in group["params"]
        ]
        outside_sign = -1.0 if signs and all(sign < 0 for sign in signs) else 1.0
        everything += [(parameter, self._rho, outside_sign) for parameter in self._outside().values()]
        names = self._names() if callable(self.targets) else {}
        candidates = []
        for parameter, rho, sign in everything:
            check_radius(rho)
            if callable(self.targets):
                left_out = None if self.targets(names[parameter], parameter) else "left out by targets="
            elif parameter.requires_grad == (self.targets == "trainable"):
                left_out = None
            else:
                left_out = f"not {self.targets}"
            candidates.append(Candidate(parameter, sign * float(rho), left_out))
        return candidates

    def _check_targets(self) -> None:
        """Refuse what can't be perturbed, before anything is."""
        targets = self._targets(factor=1.0)
        workers = self._workers()
        self._holders.forget()
        check_surroundings(self._parameters(), self.model, self.lmo, workers, self._holders)
        self._holders.forget()  # wrappers may come later
        structure = self._structure_now()
        uses = {workers.stored(use.parameter) for use in structure.uses} if structure else set()
        for parameter in (target.parameter for target in targets):
            check_parameter(parameter, self.lmo, self.placement, reachable=parameter in uses)
            if is_sharded(parameter):
                own = self._in_forward(parameter) and self._ascent.serve_from is not None
                check_sharded(parameter, self.model, self.m_sam, workers, own)

    def _check_anything_to_perturb(self) -> None:
        """Refuse an optimizer that would never perturb anything, unless its radii say so; later it may come to that."""
        radii = [group.get("rho", self._rho) for group in self.param_groups]
        radii += [] if self.targets == "trainable" else [self._rho]
        if self._targets(factor=1.0) or not any(rho > 0 for rho in radii):
            return
        raise ValueError(
            f"{type(self).__name__} has nothing to perturb: "
            f"{'the model' if self.targets != 'trainable' else 'the optimizer'} holds no "
            f"{self.targets if isinstance(self.targets, str) else 'targeted'} {self._target}; "
            "hand it such parameters, or choose another method."
        )

    def _check_processes(self, workers: DataParallel) -> None:
        """Refuse what can't be run among the processes as they are now, before a pass begins."""
        check_surroundings(self._parameters(), self.model, self.lmo, workers, self._holders)
        workers.refuse_unreduced()
        if workers.joins:
            check_join(self._progress.steps < self.delay, self.rho_schedule)
            if self._join != workers.join and workers.splits_the_batch:
                self._ascent.states.clear()  # some processes took fewer steps, and remember less
            self._join = workers.join

    def _in_forward(self, parameter: Tensor) -> bool:
        if self.placement == "auto":
            own_of_a_shard = self.m_sam is not False and is_sharded(parameter)
            needed = parameter.dtype.itemsize < 4 or not parameter.requires_grad or own_of_a_shard
            return needed and self.model is not None and isinstance(self.lmo, Nuclear)
        return self.placement == "forward"

    def _perturb(
        self, targets: list[Target], pass_: LayerPass | None, workers: DataParallel, in_forward: set[Tensor]
    ) -> dict[Tensor, Perturbation]:
        """ε for every target that the ascent reached."""
        for target in targets:
            gradient = target.parameter.grad
            if gradient is not None:
                if gradient.layout != torch.strided:
                    check_parameter(target.parameter, self.lmo, self.placement, reachable=True)
                if gradient.requires_grad:
                    target.parameter.grad = gradient.detach()  # create_graph=True leaves a graph on it
        if pass_ is not None:
            self._ascent.compare(pass_, workers, self._everyone(workers))
            surprises = self._ascent.surprises(pass_)
            self._ascent.mistrust(pass_, surprises)
            if surprises and self._may_repeat and not (workers.replicates or workers.shards):
                self._repeats, self._may_repeat = True, False
                return {}
            targets = [target for target in targets if target.parameter not in surprises]
            self._ascended = [target.parameter for target in targets]
            self._ledger.tell(list(surprises), self._names, OTHERWISE_USED)
        there = [target.parameter for target in targets if target.parameter in in_forward]
        self._refuse_unreachable(there, self._ascent.unreachable)
        found = self._ascent.perturbations(targets, pass_, _mix(self.seed, self._progress.steps), workers)
        # what this process alone knows is said once all have had their sums
        records = pass_.records.values() if pass_ is not None and pass_.keeps else []
        served = [r.parameter for r in records if r.job.in_forward and not r.job.checks and not r.is_altered]
        beside = [parameter for parameter in served if parameter.grad is not None]
        self._refuse_unreachable(there, dict.fromkeys(beside, "also used outside its layer"))
        self._ascent.verification.advance()
        if found:
            self._progress.ascents += 1
        return found

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

    def _unreachable(self, parameter: Tensor, reason: str) -> RuntimeError:
        return RuntimeError(
            f"{self._names()[parameter]} is {reason}, where an ε in the forward can't reach it; exclude it "
            "with targets= or use placement='weights'."
        )

    def _close_ledger(self, forward: Mapping[Tensor, InForward | Apart]) -> None:
        """Hold what got a gradient in the descent against what had an ε there."""
        stepped = self._in_backward.stepped if self._in_backward else set()
        self._ledger.close(stepped, self._names)
        workers = self._workers()
        missed = [] if workers.replicates or workers.shards else not_added(forward)  # gradients come from elsewhere too
        for parameter in missed:
            self._ascent.measured.pop(parameter, None)
        used = [p for p in missed if p.grad is not None or p in stepped]
        self._ascent.verification.refuse(dict.fromkeys(used, "not reached by its ε in the forward"))
        self._ledger.tell(used, self._names, "got a gradient in the descent, where no layer added its perturbation; "
                          "exclude it with targets= or use placement='weights'")  # fmt: skip

    def _structure_now(self) -> Structure | None:
        """Where the model uses its matrices, found anew if it has changed."""
        if self.model is None:
            return None
        known = self._structure
        if known is None or known.model is not self.model or not known.is_current():
            self._structure = known = Structure(self.model)
            self._ascent.verification.ask()
            self._check_targets()
        return known

    def _everyone(self, workers: DataParallel) -> DataParallel:
        return workers if self.m_sam is False else DataParallel(self.model)

    def _workers(self) -> DataParallel:
        return DataParallel(self.model, self.m_sam)

    @property
    def _states(self) -> dict[Tensor, State]:
        return self._ascent.states

    def _refuse_inside_pass(self, what: str) -> None:
        running = _itself(self)._pass
        if running is not None:
            raise RuntimeError(
                f"{what} was called inside the {running} pass, where gradients and weights are not the step's own; "
                "leave the pass first."
            )

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            own = group.get("param_names", [f"{g}.{i}" for i in range(len(group["params"]))])
            names.update(zip(group["params"], own, strict=True))
        if self.model is not None:
            stored = self._workers().stored
            names.update((stored(parameter), name) for name, parameter in unwrapped(self.model).named_parameters())
        return names

    def _states_to_save(self) -> dict[Tensor, State]:
        """Every target's state, though no ascent made it yet: what is loaded in place must be there to be filled."""
        saved: dict[Tensor, State] = {**self._states}
        for target in self._targets(factor=1.0):
            state = dict(self._ascent.state_of(target))
            saved[target.parameter] = state
        for parameter, epsilon in (self._waiting or {}).items():
            numbers = torch.stack([epsilon.sigma, epsilon.norm.to(epsilon.sigma)]).to(epsilon.v)
            saved[parameter] = {**saved.get(parameter, {}), AHEAD: torch.cat([epsilon.v, numbers])}
        return saved

    def _saved_ahead(self, saved: dict[Tensor, State]) -> dict[Tensor, RankOne] | None:
        """The ε that waited for the next step."""
        waiting = {}
        for parameter, state in saved.items():
            if AHEAD in state:
                u = self._ascent.states[parameter]["u"]
                v = state[AHEAD].to(u)
                if v.shape != (matrix_shape(parameter)[1] + 2,):
                    raise ValueError(
                        f"The state dict holds an ε of shape {tuple(v.shape)} for a matrix of shape "
                        f"{tuple(matrix_shape(parameter))}; load it into the model it was saved from."
                    )
                waiting[parameter] = RankOne(u, v[:-2].clone(), v[-2].clone(), v[-1].clone())
        return waiting or None

    def _checked_state(self, parameter: Tensor, state: State) -> State:
        """What the ball remembers of the parameter, on its device."""
        fresh = self.lmo.init_state(parameter, 0)
        for name, like in fresh.items():
            value = state.get(name, like)
            if value.shape != like.shape:
                raise ValueError(
                    f"The state dict holds {name!r} of shape {tuple(value.shape)} for a parameter that needs "
                    f"{tuple(like.shape)}; load it into the model it was saved from."
                )
            fresh[name] = value.to(like.device, like.dtype)
        return fresh

    def _watch_progress(self) -> None:
        weakref.finalize(self, self._progress.warn_if_never_perturbed)


def step_in_backward(opt: SharpnessAware) -> None:
    """Let each parameter's update run inside the descent's backward, as soon as its gradient is complete.

    Gradients are freed at once, so that with a matrix-free ascent a step needs the weights, the optimizer's state,
    one gradient and Σ(n+m) floats: less than the base optimizer alone. ``opt.step()`` is still called once a step,
    for schedules and the count. ε then lives in the forward (``placement="forward"``), since weights change
    while it is in use.

    What needs all gradients at once can't be had with it: clipping by a global norm finds no gradient and does
    nothing, accumulation is refused, and so is a GradScaler, at its ``step``. Undone by :meth:`SharpnessAware.detach`.

    Raises:
        ValueError: if some perturbed matrix has no layer in whose forward ε could live, or under DDP.
        TypeError: if the base optimizer wraps another.
    """
    opt = _itself(opt)
    opt._refuse_inside_pass("step_in_backward()")
    check_served("step_in_backward()", opt.lmo, opt.model)
    check_closure(opt.base_optimizer, needs_closure(opt.base_optimizer))
    check_alone(opt.base_optimizer)
    if opt._workers().replicates:
        raise ValueError(
            "step_in_backward() would step before DistributedDataParallel has reduced the gradients; use fully_shard "
            "(FSDP2), or leave it out."
        )
    before, opt.placement = opt.placement, "forward"
    try:
        opt._check_targets()
    except ValueError:
        opt.placement = before
        raise
    if opt._in_backward is None:
        opt._in_backward = StepInBackward(opt.base_optimizer)
        weakref.finalize(opt, opt._in_backward.remove)


class _TargetList:
    """The targets as they were chosen, and what they were chosen by."""

    def __init__(self, opt: SharpnessAware, factor: float, targets: list[Target]) -> None:
        self.targets = targets
        self._by = self._inputs(opt, factor)
        self._parameters = self._among(opt)
        self._trainable = [parameter.requires_grad for parameter in self._parameters]

    def holds(self, opt: SharpnessAware, factor: float) -> bool:
        """Whether they would be chosen again."""
        parameters = self._among(opt)
        return (
            self._by == self._inputs(opt, factor)
            and len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and self._trainable == [parameter.requires_grad for parameter in parameters]
        )

    @staticmethod
    def _inputs(opt: SharpnessAware, factor: float) -> tuple[Any, ...]:
        groups = [
            (group.get("rho", opt._rho), bool(group.get("maximize", False)), len(group["params"]))
            for group in opt.param_groups
        ]
        return factor, opt._rho, turns_round(opt.base_optimizer), groups

    @staticmethod
    def _among(opt: SharpnessAware) -> list[Tensor]:
        return [*opt._parameters(), *opt._outside().values()]


class _Progress:
    """What a finished or saved run is judged by; holds no reference to the optimizer."""

    def __init__(self) -> None:
        self.steps = 0
        self.ascents = 0
        self.wanted = False  # whether any radius, before the schedule, has been above 0
        self.told_reach = False
        self._warned = False

    def warn_if_never_perturbed(self) -> None:
        if self.wanted and self.ascents == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"The perturbation has not been active in any of {self.steps} steps: the base optimizer trained alone. "
                "If that is not meant, check delay, rho and rho_schedule, and that the loop runs over opt.passes() "
                "or calls opt.step(closure).",
                stacklevel=2,
            )


def _itself(opt: Any) -> SharpnessAware:
    return cast(SharpnessAware, itself(opt))


def _mix(seed: int, index: int) -> int:
    """A seed for the index-th use of ``seed``, within the 63 bits that a generator takes."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63
