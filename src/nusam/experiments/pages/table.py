"""The table that a comparison ends with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.box import HORIZONTALS
from rich.table import Table

from nusam.experiments.runs.rho_selection import Contest, Plan
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES

__all__ = ["Row", "StepSeconds", "rendered", "rows"]

StepSeconds = Mapping[str, Mapping[str, float]]  # for each model, for each method


@dataclass(frozen=True)
class Row:
    """A line of the table; None is what a single seed can't tell, or what was not measured."""

    model: str
    method: str
    rho: float
    seeds: int
    test_accuracy: float
    test_accuracy_se: float | None
    gain: float | None  # over AdamW, on the seeds that both finished
    gain_se: float | None
    collapsed: int  # runs that ended near chance
    relative_step_time: float | None
    perturbation_numel: int


def rows(plan: Plan, classes: int, step_seconds: StepSeconds) -> list[Row]:
    """A row for every model and method of which a run with the chosen ρ has finished."""
    return [_row(plan, contest, classes, step_seconds) for contest in plan.radii if plan.chosen_outcomes(contest)]


def _row(plan: Plan, contest: Contest, classes: int, step_seconds: StepSeconds) -> Row:
    outcomes = plan.chosen_outcomes(contest)
    accuracies = [outcome.test_accuracy for outcome in outcomes]
    baseline = {o.run.seed: o.test_accuracy for o in plan.chosen_outcomes(Contest(contest.model, "adamw"))}
    gains = [o.test_accuracy - baseline[o.run.seed] for o in outcomes if o.run.seed in baseline]
    compared = contest.method != "adamw" and len(gains) > 0
    seconds = step_seconds.get(contest.model, {})
    return Row(
        model=contest.model,
        method=contest.method,
        rho=outcomes[0].run.rho,
        seeds=len(outcomes),
        test_accuracy=fmean(accuracies),
        test_accuracy_se=_standard_error(accuracies),
        gain=fmean(gains) if compared else None,
        gain_se=_standard_error(gains) if compared else None,
        collapsed=sum(accuracy < 2 / classes for accuracy in accuracies),
        relative_step_time=seconds[contest.method] / seconds["adamw"] if seconds else None,
        perturbation_numel=outcomes[0].perturbation_numel,
    )


def _standard_error(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def rendered(lines: Sequence[Row], title: str, caption: str) -> Table:
    """The rows for a terminal."""
    table = Table(
        title=title, caption=caption, caption_justify="left", box=HORIZONTALS, collapse_padding=True, pad_edge=False
    )
    table.add_column("model")
    table.add_column("method")
    for heading in ("ρ", "seeds", "test\naccuracy", "over\nAdamW", "step\ntime", "floats\nof ε"):
        table.add_column(heading, justify="right")
    for above, line in zip([None, *lines], lines, strict=False):
        if above is not None and above.model != line.model:
            table.add_section()
        table.add_row(
            TITLES[line.model],
            METHODS[line.method].title,
            f"{line.rho:g}" if line.rho else "–",
            f"{line.seeds}",
            _percent(line.test_accuracy, line.test_accuracy_se) + (" !" if line.collapsed else ""),
            "–" if line.gain is None else _percent(line.gain, line.gain_se, sign="+"),
            "–" if line.relative_step_time is None else f"{line.relative_step_time:.2f}×",
            f"{line.perturbation_numel:,}",
        )
    return table


def _percent(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
