"""What an optimizer saves and loads."""

import weakref
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.ascent import Ascent
from nusam.lmo import Epsilon, Nuclear, RankOne, State, matrix_shape
from nusam.placement.step_in_backward import StepInBackward
from nusam.saving import load_base, merge, own_containers, split
from nusam.targets import Targeted

__all__ = ["Resumable"]


AHEAD = "ahead"  # in the state of a matrix: v of the ε that waits for the next step, its σ and its norm


class Resumable(Targeted):
    """An optimizer whose state dict is the base optimizer's, with ours in it."""

    _ascent: Ascent
    _pending: dict[Tensor, Epsilon] | None
    _waiting: dict[Tensor, RankOne] | None  # ε of the next step, for radii of 1
    _in_backward: StepInBackward | None
    _first_ascent: int | None = None  # the step of it, since the start or the last load
    _looks_ahead = False  # whether steps are taken in one pass, so that an ε may wait
    _refused = ""  # why every such step takes two, once one has

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
        saved = merge(base, self.param_groups, states, outside, self._progress.steps, served, self._refused)
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
        self._first_ascent, self._refused = None, saved.refused
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
        of_a_step: dict[str, Any] = {"_pending": None, "_ascended": [], "_layer_pass": None, "_left": None}
        return {**kept, **of_a_step, "_structure": None, "_target_list": None, "_one_pass": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_progress()

    def _states_to_save(self) -> dict[Tensor, State]:
        """Every target's state, though no ascent made it yet: what is loaded in place must be there to be filled."""
        targets = self._targets(factor=1.0)  # which lets states follow their parameters
        saved: dict[Tensor, State] = {**self._states}
        for target in targets:
            state = dict(self._ascent.state_of(target))
            saved[target.parameter] = state
            if self._looks_ahead:
                state[AHEAD] = state["u"].new_zeros(_size_ahead(target.parameter))
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
                if v.shape != (_size_ahead(parameter),):
                    raise ValueError(
                        f"The state dict holds an ε of shape {tuple(v.shape)} for a matrix of shape "
                        f"{tuple(matrix_shape(parameter))}; load it into the model it was saved from."
                    )
                waiting[parameter] = RankOne(u, v[:-2].clone(), v[-2].clone(), v[-1].clone())
        return waiting if any(float(epsilon.norm) for epsilon in waiting.values()) else None  # else none waited

    def _checked_state(self, parameter: Tensor, state: State) -> State:
        """What the ball remembers of the parameter, on its device."""
        fresh = self._ascent.fresh_state(parameter, 0)
        for name, like in fresh.items():
            value = state.get(name, like)
            if value.shape != like.shape:
                raise ValueError(
                    f"The state dict holds {name!r} of shape {tuple(value.shape)} for a parameter that needs "
                    f"{tuple(like.shape)}; load it into the model it was saved from."
                )
            fresh[name] = value.to(like.device, like.dtype)
        return fresh

    def _fit_states(self) -> None:
        self._ascent.fit_states()

    def _watch_progress(self) -> None:
        weakref.finalize(self, self._progress.warn_if_never_perturbed)

    @property
    def _states(self) -> dict[Tensor, State]:
        return self._ascent.states


def _size_ahead(parameter: Tensor) -> int:
    """Of what is saved of an ε that waits."""
    return matrix_shape(parameter)[1:].numel() + 2
