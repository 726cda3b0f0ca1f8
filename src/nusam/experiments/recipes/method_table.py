"""A table of methods: the shape that most of the paper's tables have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.runs.contest import Contender, Contest, Setting, holm, standard_error
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.spec import METRICS, Outcome
from nusam.experiments.training.text import metric_of

__all__ = ["ADAMW", "NUSAM", "SAM", "SAM_ON", "Cells", "MethodTable", "few_radii", "learning_curve", "stand_ins"]

Cells = Mapping[str, Mapping[str, str]]  # accuracy in % as the paper prints it, by its model, then by label
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}  # of the data that the paper has cells for

ADAMW = Contender("AdamW", "adamw")
SAM = Contender("SAM", "sam")
SAM_ON = Contender("SAM-ON", "sam-on")
NUSAM = Contender("νSAM", "nusam")


def stand_ins(mixer: str, vit: str) -> dict[str, str]:
    """The paper's models that the small ones stand for."""
    return {"mixer": mixer, "mixer-conv": mixer, "vit": vit, "vit-mean": vit}


@dataclass(frozen=True)
class MethodTable(Experiment):
    """Contenders on every model of a scale, the paper's cells beside ours.

    Attributes:
        paper: the paper's cells by data, as far as the text has them. Data without cells of their own have CIFAR-10's
            beside them.
        paper_best: whether the paper says that its cells are of the best iterate.
        counterparts: the paper's model that a small one stands for.
        recipe: changes to the scale's recipe.
    """

    name: str
    title: str
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...] = ("SAM", "AdamW")
    paper: Mapping[str, Cells] = field(default_factory=dict)
    paper_best: bool = True
    counterparts: Mapping[str, str] = field(default_factory=lambda: stand_ins("Mixer-S/4", "ViT-S/4"))
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by scale
    needs: str = ""
    takes: dict[str, str] = field(default_factory=lambda: {"smoke": "10 s", "cpu": "10 min", "full": "days of a GPU"})
    notes: tuple[str, ...] = ()
    published: Mapping[str, Any] = field(default_factory=lambda: Experiment.published)
    models_of_paper: tuple[str, ...] = Experiment.models_of_paper
    data_of_paper: tuple[str, ...] = Experiment.data_of_paper

    def run(self, bench: Bench) -> Result:
        """Choose every ρ, run every seed, compare."""
        changes = self.recipe.get(bench.scale_name, {})
        settings = self.settings(bench, changes)
        contests = [Contest(few_radii(setting, bench), self.contenders) for setting in settings]
        bench.hold(contests)
        column = "paper, best iterate" if self.paper_best else "paper"
        rows: list[dict[str, Any]] = []
        curves: list[Curve] = []
        for contest in contests:
            model = contest.setting.model
            _, of_paper = self._cells(bench.data, model)
            for row in contest.rows(bench.store, self.baselines):
                beside = {column: of_paper.get(row["method"], "not in our text")} if self.paper else {}
                rows.append({"model": TITLES[model], **row, **beside})
            curves += [
                learning_curve(TITLES[model], label, contest.outcomes(bench.store, label), metric_of(bench.data))
                for label in contest.contenders
            ]
        findings = self._findings(bench, contests)
        return bench.result(
            self,
            self.title,
            list(rows[0]),
            rows,
            curves,
            findings,
            settings[0],
            bench.choice_of_radius(self, contests[0]),
            self._notes_on_paper(bench.data, [setting.model for setting in settings]),
        )

    def settings(self, bench: Bench, changes: Mapping[str, Any]) -> list[Setting]:
        """What the contests are held on: one for each model of the scale."""
        return bench.settings(self, **changes)

    def _counterpart(self, model: str) -> str:
        """The paper's model that a small one stands for."""
        return self.counterparts.get(model, TITLES[model])

    def _cells(self, data: str, model: str) -> tuple[str, Mapping[str, str]]:
        """The paper's, by label, that stand beside ours, and the title of the data that they are of."""
        of = data if data in self.paper else "cifar10"
        return _TITLES[of], self.paper.get(of, {}).get(self._counterpart(model), {})

    def _notes_on_paper(self, data: str, models: list[str]) -> list[str]:
        """What the paper's cells are of."""
        if not self.paper:
            return []
        best = (
            "The paper's cells are of the best iterate"
            if self.paper_best
            else "The paper says of Table 2 that its cells are of the best iterate, and nothing of these"
        )
        notes = [f"{best}; differences and verdicts here are of the last."]
        stand_ins = [
            f"beside {TITLES[model]} stand those of {self._counterpart(model)} on {self._cells(data, model)[0]}"
            for model in models
            if data not in self.paper or self._counterpart(model) != TITLES[model]
        ]
        if stand_ins:
            what = "models" if data in self.paper else "data and models"
            notes.append(f"The paper has no cells for these {what}: {', '.join(stand_ins)}.")
        return notes

    def _findings(self, bench: Bench, contests: list[Contest]) -> str:
        """Each difference in words, with the paper's sign where the text has both cells."""
        compared = [
            (contest, label, baseline)
            for contest in contests
            for label in contest.contenders
            for baseline in self.baselines
            if label != baseline and label not in self.baselines[: self.baselines.index(baseline)]
        ]
        halves = holm([contest.differences(bench.store, *labels) for contest, *labels in compared])
        lines = [self._finding(bench, *pair, half) for pair, half in zip(compared, halves, strict=True)]
        among = f"Noise is judged by Holm's procedure at 5% for all {len(compared)} differences of this table together."
        return "\n".join([*lines, "", among])

    def _finding(self, bench: Bench, contest: Contest, label: str, baseline: str, by_holm: float) -> str:
        counterpart = self._counterpart(contest.setting.model)
        data, of_paper = self._cells(bench.data, contest.setting.model)
        mean, half = contest.difference(bench.store, label, baseline)
        ours = f"{label} − {baseline} = {mean:+.2f} ± {half:.2f} points"
        ours += f" (95% interval; ± {by_holm:.2f} by Holm)" if half < 100 else ""
        noise = abs(mean) <= by_holm
        verdict = "within the noise of these seeds" if noise else "beyond the noise of these seeds"
        open_ended = [name for name in (label, baseline) if not contest.bracketed(bench.store, name)]
        if open_ended:
            verdict += f", ρ of {' and '.join(open_ended)} at an end of what was tried"
        if label in of_paper and baseline in of_paper:
            theirs = _mean(of_paper[label]) - _mean(of_paper[baseline])
            relation = "agrees" if (theirs > 0) == (mean > 0) else "**disagrees**"
            relation = "not bracketed" if open_ended else "undecided" if noise else relation
            verdict += f"; paper ({counterpart}, {data}): {theirs:+.2f}, {relation}"
        return f"- {TITLES[contest.setting.model]}: {ours}, {verdict}."


def _mean(cell: str) -> float:
    """Of a cell like 97.16 ± 0.16."""
    return float(cell.split()[0])


def few_radii(setting: Setting, bench: Bench) -> Setting:
    """At a scale of a single radius, with the first of each method."""
    if not bench.scale.one_radius:
        return setting
    small = "mixer" if "mixer" in setting.model else "vit"
    return replace(setting, radii={name: m.radii[small][:1] for name, m in METHODS.items() if m.radii})


def learning_curve(
    panel: str, label: str, outcomes: list[Outcome], metric: str = "accuracy", banded: bool = False
) -> Curve:
    """Test accuracy over the epochs, mean of the seeds; if wanted with a band of one standard error."""
    scores = [outcome.test_accuracies for outcome in outcomes]
    columns = {number: [of_seed[number] for of_seed in scores] for number in scores[0]}
    means = [100 * sum(column) / len(column) for column in columns.values()]
    errors = None
    if banded and len(outcomes) > 1:
        errors = [standard_error([100 * accuracy for accuracy in column]) for column in columns.values()]
    return Curve(panel, label, [float(number) for number in columns], list(means), "epoch", METRICS[metric], errors)
