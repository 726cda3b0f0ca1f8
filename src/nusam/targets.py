"""Which parameters are perturbed, by what names, and how far."""

import warnings
from collections.abc import Callable
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from nusam.base_optimizer import turns_round
from nusam.combinations import Combination
from nusam.coverage import Candidate, Coverage, covered
from nusam.directions import Direction
from nusam.distributed.data_parallel import DataParallel, unwrapped
from nusam.guards.checks import check_count, check_radius, check_schedule
from nusam.layers.convolutions import kernels_of
from nusam.layers.experts import stacks_of
from nusam.lmo import LMO, Nuclear, unpacked_shape
from nusam.wrapper import Adjustable, Given, Wrapper

__all__ = ["Progress", "Target", "Targeted", "Targets", "mixed"]


Targets = str | Callable[[str, nn.Parameter], bool]

_KIND = attrgetter("requires_grad", "dtype", "shape", "device")  # of a parameter, which may be cast, moved or grown


class Target(NamedTuple):
    """A parameter that an ascent perturbs."""

    parameter: Tensor
    radius: float  # negative where the base optimizer maximizes
    seed: int  # of its state


class Targeted(Wrapper):
    """An optimizer that knows which parameters a step perturbs, by how much and by what names."""

    lmo: Given[LMO] = Given()
    delay: Adjustable[int] = Adjustable(partial(check_count, "delay"))
    rho_schedule: Adjustable[Callable[[int], float] | None] = Adjustable(check_schedule)
    targets: Given[Targets] = Given()
    placement: Given[str] = Given()
    seed: Given[int] = Given()
    m_sam: Given[Any] = Given()
    model: nn.Module | None
    _model: nn.Module | None
    _progress: "Progress"
    _target_list: "_TargetList | None"
    _stacks: set[Tensor]  # parameters that are a matrix for each expert
    _unreached: set[Tensor] | None = None  # frozen targets of which no ascent has found a gradient so far, if one ran
    _kernels: set[Tensor] | None = None  # of the model's convolutions, where these count as matrices

    direction: Given[Direction] = Given()
    combination: Given[Combination | None] = Given()

    @property
    def rho(self) -> float:
        """The radius ρ, before the schedule; the largest of the groups', which differ if they were given so.

        Setting it sets that of every group.

        Raises:
            ValueError: if the groups' differ, or the new one is no finite number ≥ 0.
        """
        return max(float(group["rho"]) for group in self.param_groups)

    @rho.setter
    def rho(self, value: float) -> None:
        check_radius(value)
        radii = {float(group["rho"]) for group in self.param_groups}
        if len(radii) > 1:
            raise ValueError(
                f"rho={value:g} would overwrite the radii of the groups, {', '.join(f'{r:g}' for r in sorted(radii))}, "
                "which differ; set the group['rho'] of each."
            )
        for group in self.param_groups:
            group["rho"] = value
        self.defaults["rho"] = value

    @property
    def _age(self) -> int:
        """Steps since the delay."""
        return self._progress.steps - self.delay

    @property
    def _is_on(self) -> bool:
        """Whether the delay is over and some group's radius is positive."""
        return self._age >= 0 and any(radius > 0 for radius in self._radii())

    @property
    def active(self) -> bool:
        """Whether the next step is perturbed: the delay is over, a radius positive, and it is the method's turn."""
        return self._is_on and (self.combination is None or self.combination.needs_ascent(self._age))

    def perturbation_numel(self) -> int:
        """Floats that ε needs: Σ(n+m) over the matrices for νSAM (Table 1), every perturbed weight for SAM."""
        return sum(self._numel(target.parameter) for target in self._targets(factor=1.0))

    def _numel(self, parameter: Tensor) -> int:
        """Floats that ε of a target needs."""
        stacked = parameter in self._stacks
        return parameter.shape[0] * sum(parameter.shape[1:]) if stacked else self.lmo.numel(parameter)

    def coverage(self) -> Coverage:
        """How many trainable entries are perturbed, once the delay is over, and by name what is not.

        Counts the entries of the model, or without ``model=`` of the optimizer, that are trainable; with
        ``targets="frozen"`` those that are frozen. Names are those of :meth:`metrics`.
        """
        names, unreached = self._names(), self._unreached or set()
        return covered(self._candidates(), names, self._perturbs, self._what_it_perturbs, self.targets, unreached)

    @property
    def _target(self) -> str:
        return self.lmo.target

    @property
    def _what_it_perturbs(self) -> str:
        return f"{self._name} perturbs a {self._target}"

    @property
    def _name(self) -> str:
        """What the user knows it by."""
        return type(self).__name__

    def _perturbs(self, parameter: Tensor) -> bool:
        if parameter in self._stacks:
            return self.placement != "forward"
        if not self.lmo.selects(parameter):
            return False
        return self._kernels is None or len(unpacked_shape(parameter)) == 2 or parameter in self._kernels

    def _find_kernels(self) -> None:
        """Which parameters of more than two dimensions are matrices: without a model all that the ball selects."""
        if self.model is not None and isinstance(self.lmo, Nuclear) and self.lmo.convolutions:
            self._kernels = set(map(self._workers().stored, kernels_of(self.model)))

    def _find_stacks(self) -> None:
        """Which parameters are a stack of matrices, each with a radius of its own; after ``detach()`` as before."""
        if self.model is None or not isinstance(self.lmo, Nuclear) or self.lmo.joint:
            return
        self._stacks.clear()
        named = partial(_chosen, self.targets, self._names()) if callable(self.targets) else None
        self._stacks.update(stacks_of(unwrapped(self.model), named))

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
                Target(parameter, radius * factor, mixed(self.seed, index))
                for index, (parameter, radius, left_out) in enumerate(self._candidates())
                if radius * factor != 0 and left_out is None and self._perturbs(parameter)
            ]
            before, self._target_list = known, _TargetList(self, factor, chosen)
            known = self._target_list
            if before is None or before.kinds != known.kinds:
                self._fit_states()
        return known.targets

    def _fit_states(self) -> None:
        """Parameters may have been cast, moved or grown: let what is remembered of them follow."""
        raise NotImplementedError

    def _candidates(self) -> list[Candidate]:
        """Every parameter that the optimizer holds, and those beside it that may be perturbed."""
        self._find_kernels()
        self._find_stacks()
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

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for g, group in enumerate(self.param_groups):
            own = group.get("param_names", [f"{g}.{i}" for i in range(len(group["params"]))])
            names.update(zip(group["params"], own, strict=True))
        if self.model is not None:
            stored = self._workers().stored
            names.update((stored(parameter), name) for name, parameter in unwrapped(self.model).named_parameters())
        return names

    def _workers(self) -> DataParallel:
        return DataParallel(self.model, self.m_sam)


def _chosen(chooses: Callable[[str, nn.Parameter], bool], names: dict[Tensor, str], parameter: nn.Parameter) -> bool:
    return chooses(names[parameter], parameter)


class _TargetList:
    """The targets as they were chosen, and what they were chosen by."""

    def __init__(self, opt: Targeted, factor: float, targets: list[Target]) -> None:
        self.targets = targets
        self._by = self._inputs(opt, factor)
        self._parameters = self._among(opt)
        self.kinds = list(map(_KIND, self._parameters))
        self.is_checked = False  # whether their weights are as precise as their ε needs

    def holds(self, opt: Targeted, factor: float) -> bool:
        """Whether they would be chosen again."""
        parameters = self._among(opt)
        return (
            self._by == self._inputs(opt, factor)
            and len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and self.kinds == list(map(_KIND, parameters))
        )

    @staticmethod
    def _inputs(opt: Targeted, factor: float) -> tuple[Any, ...]:
        groups = [
            (group.get("rho", opt._rho), bool(group.get("maximize", False)), len(group["params"]))
            for group in opt.param_groups
        ]
        without_stacks = bool(opt._stacks) and opt.placement == "forward"
        return factor, opt._rho, turns_round(opt.base_optimizer), without_stacks, groups

    @staticmethod
    def _among(opt: Targeted) -> list[Tensor]:
        return [*opt._parameters(), *opt._outside().values()]


class Progress:
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
                "If that is not meant, check delay, rho and rho_schedule, and that the loop runs over passes(), "
                "or calls step(closure) of an optimizer.",
                stacklevel=2,
            )


def mixed(seed: int, index: int) -> int:
    """A seed for the index-th use of ``seed``, within the 63 bits that a generator takes."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63
