"""Methods that compete on a data set: ρ by validation, then every seed; accuracies and paired differences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from nusam.experiments.runs.search import Search
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.methods import ALONE, METHODS
from nusam.experiments.training.spec import Outcome, Recipe, Run

__all__ = [
    "LEAST",
    "TUNING",
    "Contender",
    "Contest",
    "Setting",
    "holm",
    "interval",
    "mean_and_error",
    "mean_and_half_width",
    "standard_error",
]

TUNING = (100, 101)  # seeds that choose and are not reported
LEAST = 1 / 32  # of the radius that a search starts from


@dataclass(frozen=True)
class Contender:
    """A method with its options, under a name."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of Run
    radius_of: str = ""  # the contender whose ρ it takes over
    at_best: bool = False  # whether it stops at the epoch with the best validation accuracy

    def accuracy(self, outcome: Outcome) -> float:
        """What the contender came to in a run, in %."""
        return 100 * (outcome.accuracy_at_best if self.at_best else outcome.test_accuracy)


@dataclass(frozen=True)
class Setting:
    """What a contest is held on."""

    data: str
    model: str
    recipe: Recipe
    seeds: int
    train_size: int | None = None
    radii: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by label or method, where they are given
    tuning: Sequence[int] = TUNING
    pretrained: str = ""
    files: str = ""  # what data of one's own are

    def cell(self, contender: Contender, rho: float, seed: int) -> Cell:
        """One run."""
        run = replace(Run(self.model, contender.method, rho, seed), **contender.options)
        return Cell(self.data, self.recipe, run, self.train_size, self.pretrained, self.files)

    def at_rate(self, rate: float) -> "Setting":
        """With another learning rate."""
        return replace(self, recipe=replace(self.recipe, learning_rate=rate))

    def of_rate(self, rate: float) -> list[Cell]:
        """Runs of the base optimizer that judge a learning rate."""
        alone = Contender("", ALONE)
        return [self.at_rate(rate).cell(alone, 0.0, seed) for seed in self.tuning]

    def candidates(self, contender: Contender) -> tuple[float, ...]:
        """The radii that are given; of the base optimizer alone 0, and none where ρ is searched for."""
        if not METHODS[contender.method].kind:
            return (0.0,)
        return self.radii.get(contender.label) or self.radii.get(contender.method) or ()

    def search(self, contender: Contender) -> Search:
        """For its ρ, among the radii that are given, or from the middle one of those worth trying."""
        small = "mixer" if "mixer" in self.model else "vit"
        start = METHODS[contender.method].radii.get(small, (0.0, 0.0))[1]
        return Search(
            start,
            lambda rho: [self.cell(contender, rho, seed) for seed in self.tuning],
            LEAST * start,
            self.candidates(contender),
        )


class Contest:
    """Contenders in a setting, as far as a store knows their runs.

    Args:
        contenders: those whose radius another takes over come first.
    """

    def __init__(self, setting: Setting, contenders: Iterable[Contender]) -> None:
        self.setting = setting
        self.contenders = {contender.label: contender for contender in contenders}
        self._ended: dict[str, Search] = {}

    def searches(self) -> list[Search]:
        """For every ρ that is to be chosen."""
        return [self.setting.search(contender) for contender in self.contenders.values() if not contender.radius_of]

    def radius(self, store: Store, label: str) -> float:
        """What its search has found."""
        return self._searched(store, label).found

    def bracketed(self, store: Store, label: str) -> bool:
        """Whether a smaller and a larger ρ were tried, or none was to be chosen."""
        return self._searched(store, label).bracketed

    def _searched(self, store: Store, label: str) -> Search:
        label = self.contenders[label].radius_of or label
        if label not in self._ended:
            search = self.setting.search(self.contenders[label])
            if search.wanted(store):
                raise LookupError(f"the search for the radius of {label} is not at its end")
            self._ended[label] = search
        return self._ended[label]

    def finals(self, store: Store) -> list[Cell]:
        """Every seed with the chosen ρ."""
        return [
            self.setting.cell(contender, self.radius(store, label), seed)
            for label, contender in self.contenders.items()
            for seed in range(self.setting.seeds)
        ]

    def outcomes(self, store: Store, label: str) -> list[Outcome]:
        """A contender's runs with the chosen ρ, by seed."""
        rho = self.radius(store, label)
        return [store[self.setting.cell(self.contenders[label], rho, seed)] for seed in range(self.setting.seeds)]

    def accuracies(self, store: Store, label: str) -> list[float]:
        """In %, by seed."""
        return [self.contenders[label].accuracy(outcome) for outcome in self.outcomes(store, label)]

    def rows(self, store: Store, baselines: Iterable[str]) -> list[dict[str, Any]]:
        """A row for every contender: accuracies in %, and differences to the baselines with their 95% intervals."""
        rows = []
        for label in self.contenders:
            outcomes = self.outcomes(store, label)
            last = self.accuracies(store, label)
            best = [100 * max(outcome.test_accuracies.values()) for outcome in outcomes]
            rho = self.radius(store, label)
            row: dict[str, Any] = {
                "method": label,
                "ρ": f"{rho:g}" if rho else "–",
                "last iterate": mean_and_error(last),
                "best iterate": mean_and_error(best),
            }
            for baseline in baselines:
                row[f"over {baseline}"] = (
                    "–" if label == baseline else interval(self.differences(store, label, baseline))
                )
            rows.append(row)
        return rows

    def differences(self, store: Store, label: str, baseline: str) -> list[float]:
        """Of accuracies in points, seed by seed."""
        pairs = zip(self.accuracies(store, label), self.accuracies(store, baseline), strict=True)
        return [a - b for a, b in pairs]

    def difference(self, store: Store, label: str, baseline: str) -> tuple[float, float]:
        """The mean of the differences, and half its 95% interval."""
        return mean_and_half_width(self.differences(store, label, baseline))


def mean_and_half_width(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """And half of the confidence interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return fmean(values), math.inf
    from scipy.special import stdtrit

    return fmean(values), float(stdtrit(len(values) - 1, (1 + level) / 2)) * standard_error(values)


def holm(differences: list[list[float]]) -> list[float]:
    """Half-widths of intervals that leave out 0 where Holm's procedure rejects it, at 5% for all differences together.

    The smallest of m p-values is held against 5%/m, the next against 5%/(m − 1), until one fails; from there on the
    level is that of the one which failed.
    """
    order = sorted(range(len(differences)), key=lambda index: _p_value(differences[index]))
    halves, left, failed = [0.0] * len(differences), len(differences), False
    for index in order:
        mean, halves[index] = mean_and_half_width(differences[index], 1 - 0.05 / left)
        failed = failed or abs(mean) <= halves[index]
        left -= not failed
    return halves


def _p_value(values: list[float]) -> float:
    """Of Student's t-test against a mean of 0; 1 for a single value."""
    mean, scale = fmean(values), stdev(values) if len(values) > 1 else math.inf
    if math.isinf(scale) or mean == 0:
        return 1.0
    if scale == 0:
        return 0.0
    from scipy.special import stdtr

    return 2 * float(stdtr(len(values) - 1, -abs(mean) / scale * math.sqrt(len(values))))


def interval(values: list[float]) -> str:
    """A difference and half of its 95% interval."""
    mean, half = mean_and_half_width(values)
    return f"{mean:+.2f}" if math.isinf(half) else f"{mean:+.2f} ± {half:.2f}"


def mean_and_error(values: list[float], sign: str = "") -> str:
    """Mean ± standard error; with ``sign="+"`` that of a difference."""
    error = f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.2f}{error}"


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return stdev(values) / math.sqrt(len(values))
