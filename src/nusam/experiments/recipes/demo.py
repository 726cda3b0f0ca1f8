"""What SAM is for, on two processor cores: images of which some labels are wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, learning_curve
from nusam.experiments.runs.contest import Contender, Contest, Setting, mean_and_error, standard_error
from nusam.experiments.training.data import Source, with_wrong_labels
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import SMALL, TITLES
from nusam.experiments.training.own import OWN, content_of
from nusam.experiments.training.spec import Recipe, Run

__all__ = ["CONTENDERS", "Demo", "collapsed", "price"]

SHARE = 1 / 8
TUNING = (0,)  # the seed on which ρ is chosen, and which is reported too
AT_BEST = Contender("AdamW, best epoch", "adamw", at_best=True)
AT_A_SHARE = Contender("νSAM at 1/8", "nusam", {"ascent_share": SHARE})
ALONE = (ADAMW.label, AT_BEST.label)
CONTENDERS = (ADAMW, AT_BEST, SAM, NUSAM, AT_A_SHARE)
COLUMNS = ["model", "method", "ρ", "accuracy", "over AdamW", "work", "time", "floats of ε"]
SCORED_EVERY = 2  # epochs: scoring takes a third of the time otherwise
NEAR_CHANCE = 10  # the part of the way from guessing to no error that is near


@dataclass(frozen=True)
class Demo:
    """AdamW, AdamW stopped at its best epoch, SAM, νSAM and νSAM on a share of the batch; a Mixer and a ViT.

    ρ is chosen on the first seed by validation labels that are as wrong as the training labels.
    """

    data: str
    recipe: Recipe
    seeds: int
    train_size: int | None

    def run(self, bench: Bench, source: Source) -> Result:
        """Run what is missing of the data, whose labels are right yet, and measure how long a step takes."""
        recipe = replace(self.recipe, validates_epochs=True, scored_every=SCORED_EVERY)
        files = content_of(self.data, source)
        setting = Setting(self.data, "", recipe, self.seeds, self.train_size, tuning=TUNING, files=files)
        contests = [Contest(replace(setting, model=model, radii=self.radii(model)), CONTENDERS) for model in SMALL]
        bench.hold(contests)
        source = with_wrong_labels(source, recipe.wrong_labels)
        rows, curves, near_chance = [], [], []
        for contest in contests:
            seconds = _seconds(contest, bench, source)
            rows += [_row(contest, bench, label, seconds) for label in contest.contenders]
            curves += _over_epochs(contest, bench) + _over_price(contest, bench)
            accuracies = {label: contest.accuracies(bench.store, label) for label in contest.contenders}
            near_chance += collapsed(TITLES[contest.setting.model], accuracies, _guessing(source))
        sizes = source.sizes
        title = f"{source.title}: {sizes['train']} training images, {recipe.epochs} epochs"
        chosen, labels = "; ρ on the first seed.", ""
        if recipe.wrong_labels:
            labels = ", whose labels are right" if self.data not in OWN else ", whose labels are as they were given"
            chosen = f", whose labels are as wrong as those for training{chosen}"
        notes = [
            f"Accuracy: in % on {sizes['test']} test images{labels}, after the last epoch; ± standard error "
            f"of {self.seeds} seeds. Over AdamW: of the differences seed by seed.",
            f"ρ, and the epoch of “{AT_BEST.label}”, were chosen on {sizes['validation']} validation images{chosen}",
            "Work: operations of a step over AdamW's, which is what a large model's step takes. Time: of a "
            "step, measured here over AdamW's; a model this small spends most of it on launching operations, twice for "
            "two passes.",
            "SAM and νSAM start after 10% of the steps.",
        ]
        made_of = {
            "recipe": asdict(recipe),
            "seeds": self.seeds,
            "tuning_seeds": list(TUNING),
            "train_size": sizes["train"],
        }
        return Result("demo", title, "", self.data, COLUMNS, rows, curves, "\n".join(near_chance), notes, made_of)

    def radii(self, model: str) -> Mapping[str, tuple[float, ...]]:
        """The candidates by contender: larger where labels are wrong, and where the ascent sees a share."""
        larger = 2 if self.recipe.wrong_labels else 1

        def of(contender: Contender) -> tuple[float, ...]:
            factor = larger * (2 if "ascent_share" in contender.options else 1)
            return tuple(factor * rho for rho in METHODS[contender.method].radii.get(model, ()))

        return {contender.label: of(contender) for contender in CONTENDERS}


def price(run: Run) -> float:
    """Operations of a step that perturbs, over those of the base optimizer's."""
    return 1 + METHODS[run.method].ascent_work * run.ascent_share


def _seconds(contest: Contest, bench: Bench, source: Source) -> dict[str, float]:
    from nusam.experiments.training.step_time import step_seconds

    runs = {label: contest.outcomes(bench.store, label)[0].run for label in contest.contenders}
    del runs[AT_BEST.label]  # whose steps are AdamW's
    seconds = step_seconds(runs, source, contest.setting.recipe.batch_size, bench.device)
    return {**seconds, AT_BEST.label: seconds[ADAMW.label]}


def _row(contest: Contest, bench: Bench, label: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    outcome = contest.outcomes(bench.store, label)[0]
    differences = contest.differences(bench.store, label, ADAMW.label)
    return {
        "model": TITLES[contest.setting.model],
        "method": label,
        "ρ": f"{outcome.run.rho:g}" if outcome.run.rho else "–",
        "accuracy": mean_and_error(contest.accuracies(bench.store, label)),
        "over AdamW": "–" if label == ADAMW.label else mean_and_error(differences, "+"),
        "work": f"{price(outcome.run):.2f}",
        "time": f"{seconds[label] / seconds[ADAMW.label]:.2f}",
        "floats of ε": f"{outcome.perturbation_numel:,}",
    }


def _over_epochs(contest: Contest, bench: Bench) -> list[Curve]:
    title = TITLES[contest.setting.model]
    return [
        learning_curve(title, label, contest.outcomes(bench.store, label), banded=True)
        for label, contender in contest.contenders.items()
        if not contender.at_best
    ]


def _over_price(contest: Contest, bench: Bench) -> list[Curve]:
    panel = f"{TITLES[contest.setting.model]}, gain and price"
    curves = []
    for label in contest.contenders:
        accuracies = contest.accuracies(bench.store, label)
        error = [standard_error(accuracies)] if len(accuracies) > 1 else None
        at = price(contest.outcomes(bench.store, label)[0].run)
        curves.append(
            Curve(panel, label, [at], [fmean(accuracies)], "work of a step, AdamW = 1", "test accuracy, %", error)
        )
    return curves


def collapsed(model: str, accuracies: Mapping[str, Sequence[float]], guessing: float) -> list[str]:
    """A line for a model of which runs ended near chance: a tenth of the way, or less, from guessing to no error.

    Args:
        model: its title.
        accuracies: in %, by contender.
        guessing: the accuracy of naming the most frequent class, in %.
    """
    level = guessing + (100 - guessing) / NEAR_CHANCE
    bad = {label: sum(accuracy < level for accuracy in seeds) for label, seeds in accuracies.items()}
    if bad[ADAMW.label]:
        bad[AT_BEST.label] = 0  # the same trainings
    told = [f"{count} of {len(accuracies[label])} of {label}" for label, count in bad.items() if count]
    if not told:
        return []
    reason = ", or ρ is too large" if any(count for label, count in bad.items() if label not in ALONE) else ""
    runs = f"{', '.join(told[:-1])} and {told[-1]}" if told[1:] else told[0]
    return [f"- {model}: {runs} ended near chance, which is {guessing:.0f}%: too few epochs{reason}."]


def _guessing(source: Source) -> float:
    counts = np.bincount(source.test_labels)
    return 100 * float(counts.max() / counts.sum())
