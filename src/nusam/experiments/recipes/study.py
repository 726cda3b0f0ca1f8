"""The study: νSAM, SAM and AdamW, as registered in docs/study.md before its first run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from nusam.experiments.pages.result import Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.runs.contest import LEAST, TUNING, interval, mean_and_error, standard_error
from nusam.experiments.runs.search import Search, accuracy, carried_out
from nusam.experiments.runs.store import Cell
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.spec import Recipe, Run

__all__ = ["TABLE", "Hypothesis", "judged"]

SEEDS = {"mixer": 10, "vit": 8}  # that are reported
SETTLED = 0.7  # points by which twice the epochs may move validation accuracy at most
MOST_EPOCHS = 200
SHARE = 1 / 8
MARGIN, EQUIVALENT = 0.3, 0.5  # points
WRONG, WRONG_SEEDS = 0.2, 5  # the share of labels that are drawn anew in the last stage, and its seeds
STARTS = {  # of the search for ρ
    "mixer": {"SAM": 0.4, "SAM-ON": 1.0, "νSAM": 0.1, "νSAM at 1/8": 0.2},
    "vit": {"SAM": 0.2, "SAM-ON": 1.0, "νSAM": 0.05, "νSAM at 1/8": 0.1},
}
CONTENDERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "SAM": ("sam", {}),
    "SAM-ON": ("sam-on", {}),
    "νSAM": ("nusam", {}),
    "νSAM at 1/8": ("nusam", {"ascent_share": SHARE}),
}
VARIANTS: dict[str, Mapping[str, Any]] = {  # of νSAM, at its ρ, on the Mixer
    "νSAM, delay 0": {"delay": 0.0},
    "νSAM, delay 30%": {"delay": 0.3},
    "νSAM, T = 2": {"power_iterations": 2},
    "νSAM, T = 32": {"power_iterations": 32},  # the exact pair, as far as matters
}


@dataclass(frozen=True)
class Hypothesis:
    """That the mean difference of two rows lies above ``least``, and below ``most`` where that is finite."""

    name: str
    model: str
    row: str
    baseline: str
    least: float = 0.0
    most: float = math.inf
    then_above: bool = False  # whether, where it holds, the mean is held against 0 too, at the same level

    @property
    def claim(self) -> str:
        """In words."""
        if self.most < math.inf:
            return f"{self.row} within {self.most:g} points of {self.baseline}"
        return f"{self.row} above {self.baseline}" + (f" − {-self.least:g}" if self.least else "")

    def p_value(self, differences: Sequence[float]) -> float:
        """Of one-sided t-tests of paired differences against the margins; the larger of two."""
        from scipy.special import stdtr

        mean, error = fmean(differences), standard_error(list(differences))
        distances = [mean - self.least, *([self.most - mean] if self.most < math.inf else [])]
        return max(
            float(stdtr(len(differences) - 1, -distance / error)) if error else float(distance <= 0)
            for distance in distances
        )


HYPOTHESES = (
    Hypothesis("H1", "mixer", "νSAM", "AdamW"),
    Hypothesis("H2", "mixer", "νSAM", "SAM", -MARGIN, then_above=True),
    Hypothesis("H3", "vit", "νSAM", "SAM", -EQUIVALENT, EQUIVALENT),
    Hypothesis("H4", "mixer", "νSAM", "νSAM, delay 0"),
    Hypothesis("H5", "mixer", "νSAM", "νSAM, T = 32", -MARGIN),
    Hypothesis("H6", "mixer", "νSAM at 1/8", "νSAM", -MARGIN),
)


def judged(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which claims hold by Holm's procedure."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    holds = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        holds[index] = True
    return holds


@dataclass
class Stage:
    """What has been chosen for a model, and the rows that are reported."""

    bench: Bench
    model: str
    seeds: int
    recipe: Recipe
    radii: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """mixer or vit."""
        return "mixer" if "mixer" in self.model else "vit"

    def cells(self, run: Run, seeds: Sequence[int], recipe: Recipe | None = None) -> list[Cell]:
        """A run with each of the seeds."""
        data, size = self.bench.data, self.bench.scale.train_size[self.bench.data]
        return [Cell(data, recipe or self.recipe, replace(run, seed=seed), size) for seed in seeds]

    def choose_rate_and_epochs(self) -> None:
        """Stage 0: AdamW's learning rate, and as many epochs as it has use for."""
        store, alone = self.bench.store, Run(self.model, "adamw", 0.0, 0)

        def of(rate: float) -> list[Cell]:
            return self.cells(alone, TUNING, replace(self.recipe, learning_rate=rate))

        if self.bench.scale.one_radius:
            return
        while True:
            rate = Search(self.recipe.learning_rate, of)
            carried_out([rate], store, self.bench.fill)
            self.recipe = replace(self.recipe, learning_rate=rate.found)
            longer = self.cells(alone, TUNING, replace(self.recipe, epochs=2 * self.recipe.epochs))
            self.bench.fill(longer)
            gain = 100 * (accuracy(store, longer) - accuracy(store, of(rate.found)))
            if gain < SETTLED or 2 * self.recipe.epochs > MOST_EPOCHS:
                return
            self.recipe = replace(self.recipe, epochs=2 * self.recipe.epochs)

    def choose_radii(self) -> None:
        """Stage 1: ρ of every contender, all side by side."""
        searches = {}
        for label, start in STARTS[self.kind].items():
            method, options = CONTENDERS[label]
            run = replace(Run(self.model, method, 0.0, 0), **options)

            def of(rho: float, run: Run = run) -> list[Cell]:
                return self.cells(replace(run, rho=rho), TUNING)

            searches[label] = Search(start, of, LEAST * start)
        if not self.bench.scale.one_radius:
            carried_out(list(searches.values()), self.bench.store, self.bench.fill)
        self.radii = {label: search.found for label, search in searches.items()}

    def with_wrong_labels(self) -> "Stage":
        """Stage 4: the same, with labels that are drawn anew."""
        recipe = replace(self.recipe, wrong_labels=WRONG)
        return replace(self, recipe=recipe, seeds=min(WRONG_SEEDS, self.seeds))

    @property
    def title(self) -> str:
        """The model, and what is special about its labels."""
        wrong = self.recipe.wrong_labels
        return TITLES[self.model] + (f", {wrong:.0%} wrong labels" if wrong else "")

    def rows(self) -> dict[str, tuple[Run, float]]:
        """Every run of stages 2 and 3 (of stage 4 with wrong labels), but for its seed, and its work over AdamW's."""
        alone = Run(self.model, "adamw", 0.0, 0)
        work = METHODS["nusam"].ascent_work
        rows = {"AdamW": (alone, 1.0)}
        if not self.recipe.wrong_labels:
            rows["AdamW, twice the epochs"] = (replace(alone, stretch=2.0), 2.0)
            rows["AdamW, as much work as νSAM"] = (replace(alone, stretch=1 + work), 1 + work)
        for label, rho in self.radii.items():
            method, options = CONTENDERS[label]
            run = replace(Run(self.model, method, rho, 0), **options)
            rows[label] = (run, 1 + METHODS[method].ascent_work * run.ascent_share)
        if self.kind == "mixer" and not self.recipe.wrong_labels:
            nusam = rows["νSAM"][0]
            rows |= {label: (replace(nusam, **options), 1 + work) for label, options in VARIANTS.items()}
        return rows

    def fill(self) -> None:
        """Run what is missing."""
        self.bench.fill([cell for run, _ in self.rows().values() for cell in self.cells(run, range(self.seeds))])

    def accuracies(self, run: Run) -> list[float]:
        """In %, by seed, after the last epoch."""
        return [100 * self.bench.store[cell].test_accuracy for cell in self.cells(run, range(self.seeds))]


class Study(Experiment):
    """Whether νSAM gains on AdamW and keeps up with SAM, on a Mixer and a ViT of a size that a desk has time for."""

    name = "study"
    title = "νSAM, SAM and AdamW, registered before it was run"
    needs = "CIFAR-10 in --data-root; digits at the smallest scale"
    takes = {"smoke": "1 min", "desk": "20 h on two cores, in pieces"}  # noqa: RUF012
    notes = (
        "Registered in docs/study.md before its first run: stages, seeds, margins and analysis. Seeds 100 and 101 "
        "choose epochs, learning rate and ρ, and are not reported.",
    )
    published: Mapping[str, Any] = {}

    def run(self, bench: Bench) -> Result:
        """Go through the stages, one model after the other, and judge the six claims together."""
        stages = {}
        for model in self.models(bench.scale_name):
            kind = "mixer" if "mixer" in model else "vit"
            seeds = min(SEEDS[kind], bench.scale.seeds[bench.data])
            stage = stages[kind] = Stage(bench, model, seeds, bench.scale.recipes[bench.data])
            stage.choose_rate_and_epochs()
            stage.choose_radii()
            stage.fill()
        wrong = stages["mixer"].with_wrong_labels()
        wrong.fill()
        rows = [row for stage in (*stages.values(), wrong) for row in _table(stage)]
        setting = bench.settings(self)[0]
        return bench.result(self, self.title, list(rows[0]), rows, findings=_findings(stages), setting=setting)


def _table(stage: Stage) -> list[dict[str, Any]]:
    reported = stage.rows()
    base = stage.accuracies(reported["AdamW"][0])
    lines = []
    for label, (run, work) in reported.items():
        accuracies = stage.accuracies(run)
        differences = [a - b for a, b in zip(accuracies, base, strict=True)]
        lines.append(
            {
                "model": stage.title,
                "method": label,
                "ρ": f"{run.rho:g}" if run.rho else "–",
                "accuracy": mean_and_error(accuracies),
                "over AdamW": "–" if label == "AdamW" else interval(differences),
                "work": f"{work:.2f}",
            }
        )
    return lines


def _findings(stages: Mapping[str, Stage]) -> str:
    """The claims of the models that were run, with their differences and verdicts."""
    asked = [hypothesis for hypothesis in HYPOTHESES if hypothesis.model in stages]
    differences = []
    for hypothesis in asked:
        stage = stages[hypothesis.model]
        rows = stage.rows()
        first, second = (stage.accuracies(rows[label][0]) for label in (hypothesis.row, hypothesis.baseline))
        differences.append([a - b for a, b in zip(first, second, strict=True)])
    p_values = [hypothesis.p_value(values) for hypothesis, values in zip(asked, differences, strict=True)]
    lines = []
    for hypothesis, values, p, holds in zip(asked, differences, p_values, judged(p_values), strict=True):
        verdict = "holds" if holds else "not shown"
        lines.append(f"- {hypothesis.name}, {hypothesis.claim}: {interval(values)} points, p = {p:.2g}, {verdict}.")
        if hypothesis.then_above and holds:
            above = replace(hypothesis, least=0.0)
            lines.append(f"- {above.name}, then {above.claim}: p = {above.p_value(values):.2g}.")
    among = f"Judged by Holm's procedure at 5% for all {len(asked)} claims together; all else is exploratory."
    return "\n".join([*lines, "", among])


TABLE = Study()
