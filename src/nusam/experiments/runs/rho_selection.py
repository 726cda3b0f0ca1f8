"""Which runs a comparison needs when ρ is to be chosen, and the choice: by validation accuracy alone."""

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from nusam.experiments.training.methods import ALONE
from nusam.experiments.training.spec import Outcome, Run

__all__ = ["Contest", "Plan"]


class Contest(NamedTuple):
    """What a radius is chosen for."""

    model: str
    method: str


class Plan:
    """Every radius on the trial seeds, then the best one of each model and method on the other seeds too.

    Args:
        radii: the candidates; a single one is used without a trial.
        seeds: how many seeds the chosen radius gets.
        trial_seeds: how many of these, the first, every candidate gets.
        ascent_share: of each batch, that the ascents see.
    """

    def __init__(
        self,
        radii: Mapping[Contest, Sequence[float]],
        seeds: int,
        trial_seeds: int,
        ascent_share: float = 1.0,
    ) -> None:
        self.radii = radii
        self.ascent_share = ascent_share
        self.chosen: dict[Contest, float] = {}
        self.outcomes: list[Outcome] = []
        self.pending: deque[Run] = deque()
        self._trial_seeds = range(min(trial_seeds, seeds))
        self._other_seeds = range(len(self._trial_seeds), seeds)
        for contest, candidates in radii.items():
            self.pending.extend(self._run(contest, rho, seed) for seed in self._trial_seeds for rho in candidates)
        for contest, candidates in radii.items():
            if len(candidates) == 1:
                self._choose(contest, candidates[0])

    @property
    def models(self) -> list[str]:
        """Every model, in the order given."""
        return list(dict.fromkeys(contest.model for contest in self.radii))

    def runs(self) -> int:
        """How many runs there are in all, finished or not."""
        trials = sum(map(len, self.radii.values())) * len(self._trial_seeds)
        return trials + len(self.radii) * len(self._other_seeds)

    def add(self, outcome: Outcome) -> bool:
        """Take note of a finished run; whether it settled the choice of a radius."""
        self.outcomes.append(outcome)
        contest = Contest(outcome.run.model, outcome.run.method)
        trials = self.trials(contest)
        awaited = len(self.radii[contest]) * len(self._trial_seeds)
        if contest in self.chosen or sum(map(len, trials.values())) < awaited:
            return False
        self._choose(contest, max(trials, key=lambda rho: fmean(trials[rho])))  # of equal ones, the smallest
        return True

    def trials(self, contest: Contest) -> dict[float, list[float]]:
        """Validation accuracies of the finished trial runs, for each radius in ascending order."""
        trials: dict[float, list[float]] = {}
        for outcome in self.outcomes:
            if (outcome.run.model, outcome.run.method) == contest and outcome.run.seed in self._trial_seeds:
                trials.setdefault(outcome.run.rho, []).append(outcome.validation_accuracy)
        return dict(sorted(trials.items()))

    def chosen_outcomes(self, contest: Contest) -> list[Outcome]:
        """The finished runs with the chosen radius, in the order of their seeds; none before it is chosen."""
        rho = self.chosen.get(contest)
        found = [o for o in self.outcomes if (o.run.model, o.run.method, o.run.rho) == (*contest, rho)]
        return sorted(found, key=lambda outcome: outcome.run.seed)

    def _choose(self, contest: Contest, rho: float) -> None:
        self.chosen[contest] = rho
        self.pending.extend(self._run(contest, rho, seed) for seed in self._other_seeds)

    def _run(self, contest: Contest, rho: float, seed: int) -> Run:
        share = 1.0 if contest.method == ALONE else self.ascent_share
        return Run(*contest, rho, seed, ascent_share=share)
