"""νSAM for loops whose step belongs to an engine: the passes, and no optimizer to wrap."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from nusam.ascent.silence import INSTEAD
from nusam.ascent.verification import is_code
from nusam.coverage import Coverage
from nusam.distributed.blocks import is_sharded
from nusam.distributed.data_parallel import DataParallel, unwrapped
from nusam.guards.checks import check_radius
from nusam.guards.engine_checks import check_engine, check_saved, check_uncompiled
from nusam.layers.module_tree import same
from nusam.layers.reads import is_in_a_pass
from nusam.lmo import Nuclear
from nusam.optimizer import SharpnessAware
from nusam.placement.ledger import count_backwards
from nusam.targets import Targets
from nusam.wrapper import Given, OfPasses

__all__ = ["Perturbation"]


class Perturbation:
    """νSAM's two passes for loops whose step belongs to an engine, which keeps gradients and weights to itself::

        perturbation = nusam.Perturbation(model, rho=0.05, ascent_share=1/8)
        for batch in loader:
            for part in perturbation.passes(batch):
                engine.backward(engine(part))
            engine.step()

    ε is that of :class:`nusam.NuSAM`, which runs on the same passes. The ascent is matrix-free: no parameter takes part
    in its backward, so that no gradient is left or changed and no hook on one runs. The descent adds ε in the layers'
    forward, so that no weight is written. What can't be had that way is refused: a matrix that no known layer holds,
    one that is used beside its layer, or whose gradient the loss itself asks for. Hooks, and loops that edit gradients,
    see those of the descent alone: what they make of one is not in ε.

    Args:
        model: the module being trained, with what it is wrapped in (DistributedDataParallel, an engine).
        rho: radius of the nuclear-norm ball of each matrix; may be changed between steps.
        ascent_share: the share of each batch that the ascent sees, in (0, 1], see ``docs/cheap.md``.
        delay: steps before the perturbation starts.
        rho_schedule: maps the number of steps taken to a factor ≥ 0 on ρ.
        targets: which of the model's parameters are perturbed, as far as they are matrices: ``"trainable"``,
            ``"frozen"``, such as the base weights under LoRA, or a predicate ``(name, parameter) -> bool``.
        power_iterations: T of Algorithm 2.
        convolutions: whether the kernels of convolutions count as matrices.
        m_sam: whether every process has an ε of its own; or the process group that shares one.
        seed: of the warm starts. The global generators are never drawn from.

    Raises:
        TypeError, ValueError, NotImplementedError: in one sentence, before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float = 0.05,
        *,
        ascent_share: float = 1.0,
        delay: int = 0,
        rho_schedule: Callable[[int], float] | None = None,
        targets: Targets = "trainable",
        power_iterations: int = 1,
        convolutions: bool = False,
        m_sam: Any = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be the torch.nn.Module being trained, got {type(model).__name__}; "
                "pass the module, with what it is wrapped in."
            )
        check_radius(rho)
        parameters = _trained(model)
        self._passes = _Passes(
            _Held(parameters, {}),
            Nuclear(power_iterations, convolutions),
            rho,
            model=model,
            ascent="matrix-free",
            placement="forward",
            ascent_share=ascent_share,
            delay=delay,
            rho_schedule=rho_schedule,
            targets=targets,
            m_sam=m_sam,
            seed=seed,
        )

    def passes(self, *batch: Any, ends_step: bool = True) -> Generator[Any, None, None]:
        """Iterate over the passes of one micro-batch: the ascent, then the descent; only the latter while inactive.

        The loop body computes the loss and runs it backwards, as the engine has it. Gradients that are there are left
        alone: those of the descent add to them, as those of a single pass would.

        Args:
            batch: what comes back once a pass: several arguments as a tuple, one as itself, in the ascent cut to
                ``ascent_share`` of its samples. Without any, ``"ascent"`` and ``"descent"`` come.
            ends_step: whether the engine steps after this micro-batch; steps are what ``delay`` and ``rho_schedule``
                count. A loop left in the ascent, or before a backward in the descent, counts none.

        Raises:
            RuntimeError: inside another pass, or if something can't be had without gradients; the weights are the
                unperturbed ones then, and no gradient has been touched.
        """
        yield from self._followed(self._passes.passes(*batch, accumulate=True), ends_step)

    def _named(self, ends_step: bool) -> Generator[str, None, None]:
        """The passes by name, for loops that cut the batch themselves."""
        yield from self._followed(self._passes._passes(accumulate=True), ends_step)

    def _followed(self, passes: Any, ends_step: bool) -> Generator[Any, None, None]:
        """Passes over what the model trains now, and the step that may end with them.

        A loop that leaves the descent after a backward is taken for one that steps, as with ``break``.
        """
        self._passes.follow()
        before: int | None = None
        try:
            with self._passes.no_steps(), closing(passes):
                for part in passes:
                    before = count_backwards() if self._passes._pass == "descent" else None
                    yield part
        except GeneratorExit:
            if ends_step and before is not None and count_backwards() > before:
                self._passes.count_left()
            raise
        if ends_step:
            self._passes.count_step()

    @property
    def active(self) -> bool:
        """Whether the next step is perturbed: the delay is over and the radius positive."""
        return self._passes.active

    rho = OfPasses[float]("The radius ρ, before the schedule.")
    ascent_share = OfPasses[float]("The share of each batch that the ascent sees.")
    delay = OfPasses[int]("Steps before the perturbation starts.")
    rho_schedule = OfPasses[Callable[[int], float] | None]("Maps the number of steps taken to a factor ≥ 0 on ρ.")
    targets, m_sam, seed = Given[Any](kept=False), Given[Any](kept=False), Given[Any](kept=False)
    power_iterations, convolutions = Given[Any](kept=False), Given[Any](kept=False)

    @property
    def model(self) -> nn.Module | None:
        """The module being trained."""
        return self._passes.model

    def metrics(self) -> dict[str, float]:
        """Flat numbers for any logger, those of :meth:`SharpnessAware.metrics`. Waits for the device."""
        return self._passes.metrics()

    def coverage(self) -> Coverage:
        """How many of the model's entries are perturbed, and by name what is not."""
        return self._passes.coverage()

    def perturbation_numel(self) -> int:
        """Floats that ε needs: Σ(n+m) over the matrices."""
        return self._passes.perturbation_numel()

    def state_dict(self) -> dict[str, Any]:
        """The warm starts and what was found of every matrix, by the model's names, and the number of steps.

        All of it is plain numbers and tensors, for the client state of an engine's checkpoint.
        """
        return self._passes.saved()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state dict of this class.

        Raises:
            ValueError: if it does not fit the model; nothing is loaded then.
        """
        self._passes.load(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho:g}, ascent_share={self.ascent_share:g})"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """What the model trains now, which must be something."""
    everything = list(unwrapped(model).parameters())
    if any(map(is_in_a_pass, everything)):
        raise RuntimeError(
            "A perturbation of this model is in its passes, which another would disturb; make the other one before or "
            "after them."
        )
    trained = [parameter for parameter in everything if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"model {type(model).__name__} has no trainable parameter, so that nothing is trained; pass the module "
            "being trained."
        )
    return trained


class _Held(Optimizer):
    """The parameters that an engine steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the engine does."""


class _Passes(SharpnessAware):
    """The passes over parameters whose gradients and values are an engine's."""

    _apart = True
    _instead = INSTEAD
    _skipped: int | None = None  # steps that the engine had skipped before the last one
    _is_left = False  # whether the last step's descent was left before its end
    _everything: Sequence[nn.Parameter] = ()  # that the model held in the last passes

    @property
    def _name(self) -> str:
        return Perturbation.__name__

    @property
    def _is_on(self) -> bool:
        """Also whether anything is left to perturb: an ascent without targets would leave its gradients."""
        return super()._is_on and (self._pass is not None or bool(self._targets(factor=1.0)))

    def follow(self) -> None:
        """Hold the parameters that the model trains now."""
        self._refuse_inside_pass("passes()")
        self._count_skipped()
        is_left, self._is_left = self._is_left, False
        if is_left:
            self._close_left()
        model = cast(nn.Module, self.model)
        self.param_groups[0]["params"][:] = _trained(model)
        everything = list(unwrapped(model).parameters())
        if not same(everything, self._everything):
            self._everything, self._structure = everything, None  # their layers may be new too

    def no_steps(self) -> AbstractContextManager[None]:
        """Inside, no engine steps."""
        engine = self._workers().engine
        return nullcontext() if engine is None else engine.passes()

    def count_step(self) -> None:
        """The engine is about to step."""
        self.step()
        self._remember_skipped()

    def count_left(self) -> None:
        """The engine is about to step, by a descent that was left; what is due of it is told before the next pass."""
        self._is_left = True
        self._count()
        self._remember_skipped()

    def _remember_skipped(self) -> None:
        engine = self._workers().engine
        self._skipped = None if engine is None else engine.skipped

    def _count_skipped(self) -> None:
        """Take back the last step, if the engine has skipped it."""
        engine = self._workers().engine
        if engine is not None and self._skipped is not None and engine.skipped > self._skipped:
            self._progress.steps -= 1
            self._skipped = engine.skipped

    def saved(self) -> dict[str, Any]:
        self._refuse_inside_pass("state_dict()")
        self._count_skipped()
        self._progress.warn_if_never_perturbed()
        names = self._names()
        return {
            "rho": self.param_groups[0]["rho"],
            "steps": self._progress.steps,
            "matrices": {names[p]: dict(state) for p, state in self._states_to_save().items()},
            "found": {names[p]: code for p, code in self._ascent.verification.codes()},
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        self._refuse_inside_pass("load_state_dict()")
        check_saved(saved, is_code)
        parameters = {name: parameter for parameter, name in self._names().items()}
        unknown = [name for name in saved["matrices"] if name not in parameters]
        if unknown:
            raise ValueError(
                f"The state dict holds {unknown[0]!r}, which the model has not; load it into the one it was saved from."
            )
        given = {parameters[name]: state for name, state in saved["matrices"].items()}
        states = {p: self._checked_state(p, state) for p, state in given.items() if self._perturbs(p)}
        for group in self.param_groups:
            group["rho"] = saved["rho"]
        self.defaults["rho"] = saved["rho"]
        self._ascent.states, self._ascent.measured, self._pending = states, {}, None
        found = {parameters[name]: code for name, code in saved["found"].items() if name in parameters}
        self._ascent.verification.load(found)
        self._progress.steps, self._progress.ascents = saved["steps"], max(0, saved["steps"] - self.delay)
        self._first_ascent = self._skipped = None

    def _check_targets(self) -> None:
        engine = self._workers().engine
        if engine is not None:
            check_uncompiled(engine.module.modules())
        targets = [target.parameter for target in self._targets(factor=1.0)]
        names = self._names()
        for parameter in targets:
            if is_sharded(parameter):
                raise NotImplementedError(
                    f"{names[parameter]} is a DTensor, whose gradients are your loop's and no engine's; use {INSTEAD}."
                )
        structure = self._structure
        if structure is not None:
            for parameter in targets:
                if not structure.uses_of(parameter):
                    raise ValueError(
                        f"{names[parameter]} is held by no known layer, in whose forward ε could live; exclude it with "
                        f"targets= or use {INSTEAD}."
                    )
        super()._check_targets()

    def _check_processes(self, workers: DataParallel) -> None:
        if workers.forced is not None:
            raise RuntimeError(
                f"A perturbation that leaves gradients alone can't be had where {workers.forced.why}; use "
                f"{workers.forced.instead}."
            )
        check_engine(self._parameters(), workers, self._holders)
        super()._check_processes(workers)
