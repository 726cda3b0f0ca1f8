"""Figure 3: the perturbation delay."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.recipes.method_table import ADAMW, few_radii
from nusam.experiments.runs.contest import Contender, Contest, interval, mean_and_error, mean_and_half_width
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES

DELAYS = (0.0, 0.1, 0.25, 0.5)
FACTOR = 4  # by which a delay of 10% raises the gain over AdamW, says the paper's introduction


class Figure3(Experiment):
    """SAM and νSAM with every delay, each at its best ρ."""

    name = "fig3"
    title = "Delaying the perturbation"
    needs = ""
    takes = {"smoke": "10 s", "cpu": "20 min", "full": "weeks of a GPU"}  # noqa: RUF012
    notes = (
        "The paper's figure is of ViT-S/4 on CIFAR-10 over 300 epochs, as the full scale is; its plots are not in our "
        "text, which says that both SAM and νSAM benefit from a delay beyond the warm-up, that νSAM's best ρ grows "
        "with it, and that it raises the gain over AdamW by a factor of about 4.",
    )
    published = {"augment": "crop-flip-autoaugment", "epochs": 300, "seeds": 3}  # noqa: RUF012
    models_of_paper = ("vit-s/4",)
    data_of_paper = ("cifar10",)

    def run(self, bench: Bench) -> Result:
        """Run and draw: the best ρ and its accuracy for every delay."""
        delays = DELAYS[:2] if bench.scale.one_radius else DELAYS
        delayed = {
            (method, delay): Contender(
                f"{METHODS[method].title}, delay {delay:.0%}",
                method,
                {} if delay == METHODS[method].delay else {"delay": delay},  # under which others find the run too
            )
            for method in ("sam", "nusam")
            for delay in delays
        }
        settings = bench.settings(self)
        contests = [Contest(few_radii(setting, bench), (ADAMW, *delayed.values())) for setting in settings]
        bench.hold(contests)
        rows = [_row(bench, contest, contender) for contest in contests for contender in delayed.values()]
        curves: list[Curve] = []
        findings = []
        for contest in contests:
            for method in ("sam", "nusam"):
                labels = [delayed[method, delay].label for delay in delays]
                curves += _curves(bench, contest, method, labels, [100 * delay for delay in delays])
                findings.append(_claim(bench, contest, method, *labels[:2]))
        choice = bench.choice_of_radius(self, contests[0])
        return bench.result(
            self, self.title, list(rows[0]), rows, curves, "\n".join(findings), contests[0].setting, choice
        )


def _row(bench: Bench, contest: Contest, contender: Contender) -> dict[str, Any]:
    store, label = bench.store, contender.label
    method, delay = label.split(", delay ")
    return {
        "model": TITLES[contest.setting.model],
        "method": method,
        "delay": delay,
        "best ρ": f"{contest.radius(store, label):g}" + ("" if contest.bracketed(store, label) else ", not bracketed"),
        "last iterate": mean_and_error(contest.accuracies(store, label)),
        "over AdamW": interval(contest.differences(store, label, ADAMW.label)),
    }


def _curves(bench: Bench, contest: Contest, method: str, labels: Sequence[str], x: list[float]) -> list[Curve]:
    title, model = METHODS[method].title, TITLES[contest.setting.model]
    accuracies = [contest.accuracies(bench.store, label) for label in labels]
    halves = [mean_and_half_width(values)[1] for values in accuracies]
    errors = [half if half < 100 else 0.0 for half in halves]
    means: list[float | None] = [fmean(values) for values in accuracies]
    radii: list[float | None] = [contest.radius(bench.store, label) for label in labels]
    delay = "delay, % of the steps"
    return [
        Curve(f"{model}, accuracy with the best ρ", title, x, means, delay, "test accuracy, %", errors),
        Curve(f"{model}, the best ρ", title, x, radii, delay, "ρ", log_y=True),
    ]


def _claim(bench: Bench, contest: Contest, method: str, without: str, delayed: str) -> str:
    """Whether the gain with a delay is so many times the gain without, seed by seed."""
    gains = [contest.differences(bench.store, label, ADAMW.label) for label in (without, delayed)]
    beyond = [after - FACTOR * before for before, after in zip(*gains, strict=True)]
    more = [after - before for before, after in zip(*gains, strict=True)]
    mean, half = mean_and_half_width(beyond)
    verdict = "compatible" if abs(mean) <= half else "refuted"
    if half > FACTOR * abs(fmean(gains[0])):  # as wide as what is asked about
        verdict = "undecided"
    return (
        f"- {TITLES[contest.setting.model]}, {METHODS[method].title}: a delay of 10% adds {interval(more)} points to a "
        f"gain of {interval(gains[0])}; the paper's factor of {FACTOR} is {verdict} (gain with it − {FACTOR} × gain "
        f"without: {interval(beyond)})."
    )


FIGURE = Figure3()
