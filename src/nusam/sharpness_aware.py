"""Sharpness-aware minimization over any norm ball, around any PyTorch optimizer (Algorithm 1, eq. (6))."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.checks import check_base_optimizer, check_choice, check_count, check_parameter, check_radius
from nusam.interrupts import always
from nusam.lmo import L2, LMO, Gaussian, Nuclear, NuclearNormalized, Perturbation, RankOne, State
from nusam.model_guard import RandomState, frozen_statistics, normalization_parameters, refuse_use
from nusam.placement import in_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GaussSAM", "NuSAM", "NuSAMNorm", "SAM", "SAMON", "SharpnessAware"]

_STATE_PREFIX = "nusam_"  # marks our entries among the base optimizer's in a state dict
_STEPS = "nusam_steps"


class Options(TypedDict, total=False):
    """Arguments that every method of :class:`SharpnessAware` takes."""

    delay: int
    rho_schedule: Callable[[int], float] | None
    model: nn.Module | None
    ascent: str
    placement: str
    m_sam: bool
    seed: int


class SharpnessAware(Optimizer):
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
        model: the module being trained. With it, running statistics of batch norm move once per step (in the
            ascent pass), both passes see the same dropout mask, and saving, copying or evaluating the model
            inside the descent pass raises. Without it, statistics move twice, masks differ, and the descent
            pass is yours to respect.
        ascent: ``"gradient"``; ``"auto"`` chooses it.
        placement: ``"weights"`` adds ε to the weights and takes it back; ``"auto"`` chooses it, and refuses
            rank-one perturbations of weights below float32, where most of ε would be rounded away.
        m_sam: must be False: distributed m-SAM is not available yet.
        seed: of the warm starts and of Gaussian noise. The global generators are never drawn from.

    Raises:
        TypeError, ValueError, NotImplementedError: in one sentence, before anything is changed.
    """

    _pass: str | None = None  # the pass that is running

    def __init__(
        self,
        base_optimizer: Optimizer,
        lmo: LMO,
        rho: float = 0.05,
        *,
        delay: int = 0,
        rho_schedule: Callable[[int], float] | None = None,
        model: nn.Module | None = None,
        ascent: str = "auto",
        placement: str = "auto",
        m_sam: bool = False,
        seed: int = 0,
    ) -> None:
        check_base_optimizer(base_optimizer)
        if not isinstance(lmo, LMO):
            raise TypeError(f"lmo must be a norm ball from nusam.lmo, such as nusam.lmo.Nuclear(), got {lmo!r}.")
        for group in base_optimizer.param_groups:
            check_radius(group.get("rho", rho))
        check_count("delay", delay)
        check_count("seed", seed)
        if rho_schedule is not None and not callable(rho_schedule):
            raise TypeError(f"rho_schedule must map a step to a factor on rho, or be None, got {rho_schedule!r}.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module being trained, or None, got {type(model).__name__}.")
        check_choice("ascent", ascent, ("auto", "gradient"), later=("matrix-free",))
        check_choice("placement", placement, ("auto", "weights"), later=("forward",))
        check_choice("m_sam", m_sam, (False,), later=(True,))

        # Optimizer.__init__ fills fresh groups and state; ours are the base optimizer's, so a stand-in takes them.
        stand_in = SimpleNamespace(add_param_group=lambda group: None)
        self.base_optimizer = cast(Optimizer, stand_in)
        defaults = {**base_optimizer.defaults, "rho": rho}
        super().__init__([{"params": group["params"]} for group in base_optimizer.param_groups], defaults)
        self.base_optimizer = base_optimizer

        self.lmo = lmo
        self.delay = delay
        self.rho_schedule = rho_schedule
        self.model = model
        self.placement = placement
        self.seed = seed
        self._states: dict[Tensor, State] = {}
        self._measured: dict[Tensor, dict[str, Tensor]] = {}
        self._pending: tuple[list[Tensor], list[Perturbation]] | None = None
        self._random_state: RandomState | None = None
        self._progress = _Progress()
        chosen = [p for group in self.param_groups for p in group["params"] if self._perturbs(p)]
        if not chosen:
            raise ValueError(
                f"{type(self).__name__} has nothing to perturb: the optimizer holds no trainable {self._target}; "
                "hand it such parameters, or choose another method."
            )
        for parameter in chosen:
            check_parameter(parameter, self.lmo, self.placement)
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)
        self._watch_progress()

    # ---------------------------------------------------------------- the two passes

    def passes(self, accumulate: bool = False) -> Iterator[str]:
        """Iterate over the passes of one step: ``"ascent"``, then ``"descent"``; only the latter while inactive.

        The loop body computes the loss and calls ``backward``. Each pass starts with cleared gradients; with
        ``accumulate=True`` the descent gradient adds to what is there, and the ascent leaves no trace in it:
        every micro-batch gets its own perturbation. However the loop is left, the weights are the unperturbed
        ones afterwards; a loop left in the ascent leaves no gradient of it behind.

        Raises:
            RuntimeError: inside another pass, or if a pass computed no gradient at all.
            ValueError: if ``rho_schedule`` or a group's ``rho`` gave something else than a finite number ≥ 0.
        """
        if self.active:
            with self.ascent(accumulate):
                yield "ascent"
        with self.descent(accumulate):
            yield "descent"

    @contextmanager
    def ascent(self, accumulate: bool = False) -> Iterator[None]:
        """The first half of :meth:`passes`, for loops whose passes live in different functions.

        On leaving, ε is computed from the gradients, and these are put away. While :attr:`active` is False
        there is nothing to gain from running it.
        """
        self._refuse_inside_pass("ascent()")
        radii = self._radii()
        parameters = self._parameters()
        kept = [parameter.grad if accumulate else None for parameter in parameters]

        def undo() -> None:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
            self._pass = None

        self._pending = None
        with always(undo):
            self._pass = "ascent"
            _clear_gradients(parameters)
            if self.model is not None:
                self._random_state = RandomState(self.model)
            yield
            self._require_gradients("ascent")
            self._pending = self._perturb(radii)

    @contextmanager
    def descent(self, accumulate: bool = False) -> Iterator[None]:
        """The second half of :meth:`passes`: inside, the weights are x + ε; afterwards x again."""
        self._refuse_inside_pass("descent()")
        if self._pending is None and self.active:
            raise RuntimeError(
                "descent() was entered without a perturbation; run 'with opt.ascent():' on the same sample first, "
                "or loop over opt.passes()."
            )
        parameters, perturbations = self._pending or ([], [])
        perturbed = in_weights(parameters, perturbations)

        def undo() -> None:
            perturbed.remove()
            self._pass = None

        with always(undo), ExitStack() as guards:
            self._pass = "descent"
            if not accumulate:
                _clear_gradients(self._parameters())
            if self._pending is not None and self.model is not None:
                guards.enter_context(frozen_statistics(self.model))
                guards.enter_context(refuse_use(self.model))
                if self._random_state is not None:
                    self._random_state.replay()
            self._pending = None
            self._random_state = None
            del perturbations
            perturbed.add()
            yield
            if not accumulate:
                self._require_gradients("descent")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step with the gradients that are there.

        Args:
            closure: runs one pass ([zero_grad,] forward, backward) and returns the loss. With it, ``step``
                first runs the passes itself, and returns the loss at the unperturbed weights.

        Raises:
            RuntimeError: inside a pass.
        """
        self._refuse_inside_pass("step()")
        losses = []
        if closure is not None:
            for _ in self.passes():
                with torch.enable_grad():
                    losses.append(closure())
        self._pending = None
        self.base_optimizer.step()
        self._progress.steps += 1
        return losses[0] if losses else None

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
        return sum(
            self.lmo.numel(parameter)
            for group in self.param_groups
            if group["rho"] > 0
            for parameter in group["params"]
            if self._perturbs(parameter)
        )

    def metrics(self) -> dict[str, float]:
        """Flat numbers for any logger; the only call that waits for the device.

        ``active`` (of the next step) and ``rho`` (the largest radius of the groups, after the schedule); for
        each parameter of the last ascent ``epsilon/NAME``, ‖ε‖_F, and for rank-one perturbations
        ``sigma/NAME``, the estimate of its gradient's top singular value, times the loss scale if a scaler was
        at work. Names are the model's where ``model=`` was given, else the optimizer's own, else GROUP.INDEX.
        """
        names = self._names()
        measured = {
            f"{kind}/{names[parameter]}": value
            for parameter, values in self._measured.items()
            for kind, value in values.items()
        }
        device = next(iter(measured.values())).device if measured else None
        tensors = [value.to(device, torch.float32) for value in measured.values()]
        values = torch.stack(tensors).tolist() if tensors else []
        return {"active": float(self.active), "rho": max(self._radii()), **dict(zip(measured, values, strict=True))}

    # ---------------------------------------------------------------- what makes it an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with a key ``"rho"``."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

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
            check_radius(groups[-1].setdefault("rho", self.defaults["rho"]))
            for parameter in groups[-1]["params"]:
                if self._perturbs(parameter):
                    check_parameter(parameter, self.lmo, self.placement)
        except Exception:
            groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with our warm starts among the entries of each parameter."""
        self._refuse_inside_pass("state_dict()")
        self._progress.warn_if_never_perturbed()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = self.base_optimizer.state_dict()
        state = dict(saved["state"])
        for key, parameter in self._keys(saved):
            ours = {_STATE_PREFIX + name: value for name, value in self._states.get(parameter, {}).items()}
            if ours:
                state[key] = {**state.get(key, {}), **ours}
        groups = [{**group, _STEPS: self._progress.steps} for group in saved["param_groups"]]
        saved = {**saved, "state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or one that the base optimizer saved alone.

        Raises:
            ValueError: if it does not fit the parameters; nothing is loaded then.
        """
        self._refuse_inside_pass("load_state_dict()")
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        rhos = [group["rho"] for group in self.param_groups]
        steps = max((group.get(_STEPS, 0) for group in state_dict["param_groups"]), default=0)
        for group in state_dict["param_groups"]:
            check_radius(group.get("rho", 0))
        theirs, states = self._split(state_dict)
        self.base_optimizer.load_state_dict(theirs)
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
        self._states, self._measured, self._pending = states, {}, None
        self._progress.steps, self._progress.ascents = steps, max(0, steps - self.delay)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_pass("copying or pickling the optimizer")
        left_out = ("step", "_hook_for_profile", "_pending", "_random_state")
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        return {
            **{name: state[name] for name in state if name not in left_out},
            "_pending": None,
            "_random_state": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_progress()

    # ---------------------------------------------------------------- behind the passes

    @property
    def _target(self) -> str:
        return self.lmo.target

    def _perturbs(self, parameter: Tensor) -> bool:
        return parameter.requires_grad and self.lmo.selects(parameter)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _radii(self) -> list[float]:
        """ρ of every group at this step: its own times the schedule's factor."""
        factor = 1.0 if self.rho_schedule is None else self.rho_schedule(self._progress.steps)
        check_radius(factor, f"rho_schedule({self._progress.steps})")
        for group in self.param_groups:
            check_radius(group["rho"])
        return [float(group["rho"]) * float(factor) for group in self.param_groups]

    @torch.no_grad()
    def _perturb(self, radii: list[float]) -> tuple[list[Tensor], list[Perturbation]]:
        """ε for every parameter that is to be perturbed and has an ascent gradient."""
        groups = zip(self.param_groups, radii, strict=True)
        positions = enumerate((parameter, radius) for group, radius in groups for parameter in group["params"])
        chosen = [
            (index, parameter, radius)
            for index, (parameter, radius) in positions
            if radius > 0 and parameter.grad is not None and self._perturbs(parameter)
        ]
        parameters = [parameter for _, parameter, _ in chosen]
        if not parameters:
            return [], []
        for parameter in parameters:
            check_parameter(parameter, self.lmo, self.placement)
        for index, parameter, _ in chosen:
            if parameter not in self._states:
                self._states[parameter] = self.lmo.init_state(parameter, _mix(self.seed, index))
        perturbations = self.lmo(
            [cast(Tensor, parameter.grad) for parameter in parameters],
            [radius for _, _, radius in chosen],
            [self._states[parameter] for parameter in parameters],
            _mix(self.seed, self._progress.steps),
        )
        self._measured = {
            parameter: {"sigma": perturbation.sigma, "epsilon": perturbation.norm}
            if isinstance(perturbation, RankOne)
            else {"epsilon": perturbation.norm}
            for parameter, perturbation in zip(parameters, perturbations, strict=True)
        }
        self._progress.ascents += 1
        return parameters, perturbations

    def _require_gradients(self, name: str) -> None:
        if all(parameter.grad is None for parameter in self._parameters()):
            raise RuntimeError(
                f"The {name} pass ended without any gradient; compute the loss and call loss.backward() in every pass."
            )

    def _refuse_inside_pass(self, what: str) -> None:
        if self._pass is not None:
            raise RuntimeError(
                f"{what} was called inside the {self._pass} pass, where gradients and weights are not the step's own; "
                "leave the pass first."
            )

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            own = group.get("param_names", [f"{g}.{i}" for i in range(len(group["params"]))])
            names.update(zip(group["params"], own, strict=True))
        if self.model is not None:
            names.update((parameter, name) for name, parameter in self.model.named_parameters())
        return names

    def _keys(self, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """The key of every parameter in a state dict of the same groups."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            yield from zip(saved["params"], group["params"], strict=True)

    def _split(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[Tensor, State]]:
        """A state dict as the base optimizer would have saved it, and our states."""
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                "The state dict's parameter groups don't match the optimizer's in number or size; "
                "build the optimizer from the same groups before loading."
            )
        groups = [{name: value for name, value in group.items() if name != _STEPS} for group in saved_groups]
        state: dict[Any, Any] = dict(state_dict["state"])
        states: dict[Tensor, State] = {}
        for key, parameter in self._keys(state_dict):
            entries = state.pop(key, {})
            ours = {name: value for name, value in entries.items() if str(name).startswith(_STATE_PREFIX)}
            rest = {name: value for name, value in entries.items() if name not in ours}
            if rest:
                state[key] = rest
            fresh = self.lmo.init_state(parameter, 0) if ours and self._perturbs(parameter) else {}
            for name, like in fresh.items():
                value = ours.get(_STATE_PREFIX + name, like)
                if value.shape != like.shape:
                    raise ValueError(
                        f"The state dict holds {name!r} of shape {tuple(value.shape)} for a parameter that needs "
                        f"{tuple(like.shape)}; load it into the model it was saved from."
                    )
                states.setdefault(parameter, {})[name] = value.to(like.device, like.dtype)
        return {**state_dict, "state": state, "param_groups": groups}, states

    def _watch_progress(self) -> None:
        weakref.finalize(self, self._progress.warn_if_never_perturbed)


class _Progress:
    """What a finished or saved run is judged by; holds no reference to the optimizer."""

    def __init__(self) -> None:
        self.steps = 0
        self.ascents = 0
        self._warned = False

    def warn_if_never_perturbed(self) -> None:
        if self.steps > 0 and self.ascents == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"The perturbation has not been active in any of {self.steps} steps: the base optimizer trained alone. "
                "If that is not meant, check delay, rho and rho_schedule, and that the loop runs over opt.passes() "
                "or calls opt.step(closure).",
                stacklevel=2,
            )


class NuSAM(SharpnessAware):
    """νSAM (Algorithm 1): rank-one perturbation ρ·u·vᵀ of every weight matrix, n+m floats instead of n·m.

    Only 2-D parameters are perturbed; ρ holds for each matrix on its own. Takes every argument of
    :class:`SharpnessAware`.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the nuclear-norm ball of each matrix. Its useful range is below SAM's and depends on
            width and architecture.
        power_iterations: T of Algorithm 2; the paper finds 1 sufficient (Table 10).
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, power_iterations: int = 1, **options: "Unpack[Options]"
    ) -> None:
        super().__init__(base_optimizer, Nuclear(power_iterations), rho, **options)


class NuSAMNorm(SharpnessAware):
    """νSAM-Norm (Appendix C.1): as :class:`NuSAM`, with one radius shared by all matrices, eq. (21)."""

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, power_iterations: int = 1, **options: "Unpack[Options]"
    ) -> None:
        super().__init__(base_optimizer, NuclearNormalized(power_iterations), rho, **options)


class SAM(SharpnessAware):
    """SAM (Foret et al. 2020): ε = ρ·∇f/‖∇f‖₂ over all parameters; keeps a second copy of the weights."""

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, L2(), rho, **options)


class SAMON(SharpnessAware):
    """SAM-ON (Müller et al. 2023): SAM on the parameters of normalization layers only.

    Needs ``model=`` to find them: modules whose class name contains "norm". The paper gives it no delay.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        if options.get("model") is None:
            raise ValueError("SAMON perturbs normalization layers only and needs model= to find them; pass the model.")
        super().__init__(base_optimizer, L2(), rho, **options)

    @property
    def _target(self) -> str:
        return "parameter of a normalization layer"

    def _perturbs(self, parameter: Tensor) -> bool:
        return parameter in self._normalization and super()._perturbs(parameter)

    @cached_property
    def _normalization(self) -> set[nn.Parameter]:
        return normalization_parameters(cast(nn.Module, self.model))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.__dict__.pop("_normalization", None)  # the group may bring layers that the model did not have
        super().add_param_group(param_group)


class GaussSAM(SharpnessAware):
    """GaussSAM (Figure 1's control): ε = ρ·e/‖e‖₂ with Gaussian e, at SAM's cost."""

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, Gaussian(), rho, **options)


def _clear_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _mix(seed: int, index: int) -> int:
    """A seed for the index-th use of ``seed``, within the 63 bits that a generator takes."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63
