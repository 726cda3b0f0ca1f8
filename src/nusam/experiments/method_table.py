"""A table of methods: the shape that most of the paper's tables have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nusam.experiments.contest import Contender, Contest, Setting
from nusam.experiments.experiment import Bench, Experiment
from nusam.experiments.methods import METHODS
from nusam.experiments.models import TITLES
from nusam.experiments.result import Curve, Result
from nusam.experiments.training import Outcome

__all__ = ["ADAMW", "NUSAM", "SAM", "SAM_ON", "MethodTable"]

ADAMW = Contender("AdamW", "adamw")
SAM = Contender("SAM", "sam")
SAM_ON = Contender("SAM-ON", "sam-on")
NUSAM = Contender("νSAM", "nusam")


@dataclass(frozen=True)
class MethodTable(Experiment):
    """Contenders on every model of a scale, the paper's cells beside ours.

    Attributes:
        paper: accuracy in % by the paper's model, then by label; as far as the text has them.
        paper_setting: what they were measured on.
        counterparts: the paper's model that a small one stands for.
        recipe: changes to the scale's recipe.
    """

    name: str
    title: str
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...] = ("SAM", "AdamW")
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    paper_setting: str = ""
    counterparts: Mapping[str, str] = field(default_factory=lambda: {"mixer": "Mixer-S/4", "vit": "ViT-S/4"})
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by scale
    needs: str = ""
    takes: dict[str, str] = field(default_factory=lambda: {"smoke": "10 s", "cpu": "10 min", "full": "days of a GPU"})
    notes: tuple[str, ...] = ()

    def run(self, bench: Bench) -> Result:
        """Choose every ρ, run every seed, compare."""
        changes = self.recipe.get(bench.scale_name, {})
        settings = self.settings(bench, changes)
        contests = [Contest(_few_radii(setting, bench), self.contenders) for setting in settings]
        bench.fill(cell for contest in contests for cell in contest.trials())
        bench.fill(cell for contest in contests for cell in contest.finals(bench.store))
        rows: list[dict[str, Any]] = []
        curves: list[Curve] = []
        for contest in contests:
            model = contest.setting.model
            of_paper = self.paper.get(self._counterpart(model), {})
            for row in contest.rows(bench.store, self.baselines):
                given = of_paper.get(row["method"])
                beside = {} if not self.paper else {"paper": "not in our text" if given is None else f"{given:.2f}"}
                rows.append({"model": TITLES[model], **row, **beside})
            curves += [
                _curve(TITLES[model], label, contest.outcomes(bench.store, label)) for label in contest.contenders
            ]
        findings = "\n".join(self._finding(bench, contest) for contest in contests)
        return bench.result(self, self.title, list(rows[0]), rows, curves, findings, settings[0].recipe)

    def settings(self, bench: Bench, changes: Mapping[str, Any]) -> list[Setting]:
        """What the contests are held on: one for each model of the scale."""
        return bench.settings(**changes)

    def _counterpart(self, model: str) -> str:
        """The paper's model that a small one stands for."""
        return self.counterparts.get(model, TITLES[model])

    def _finding(self, bench: Bench, contest: Contest) -> str:
        """Each difference in words, with the paper's sign where the text has both cells."""
        counterpart = self._counterpart(contest.setting.model)
        of_paper = self.paper.get(counterpart, {})
        lines = []
        for label in contest.contenders:
            for baseline in self.baselines:
                if label == baseline or label in self.baselines[: self.baselines.index(baseline)]:
                    continue
                mean, half = contest.difference(bench.store, label, baseline)
                ours = f"{label} − {baseline} = {mean:+.2f} ± {half:.2f} points"
                ours += " (95% interval)" if half < 100 else ""
                noise = abs(mean) <= half
                verdict = "within the noise of these seeds" if noise else "beyond the noise of these seeds"
                if label in of_paper and baseline in of_paper:
                    theirs = of_paper[label] - of_paper[baseline]
                    relation = "undecided" if noise else "agrees" if (theirs > 0) == (mean > 0) else "**disagrees**"
                    verdict += f"; paper ({counterpart}, {self.paper_setting}): {theirs:+.2f}, {relation}"
                lines.append(f"- {TITLES[contest.setting.model]}: {ours}, {verdict}.")
        return "\n".join(lines)


def _few_radii(setting: Any, bench: Bench) -> Any:
    if not bench.scale.one_radius:
        return setting
    small = "mixer" if "mixer" in setting.model else "vit"
    return replace(setting, radii={name: m.radii[small][:1] for name, m in METHODS.items() if m.radii})


def _curve(panel: str, label: str, outcomes: list[Outcome]) -> Curve:
    epochs = list(zip(*(outcome.epochs for outcome in outcomes), strict=True))
    means = [100 * sum(epoch.test_accuracy for epoch in column) / len(column) for column in epochs]
    x = [float(i) for i in range(1, len(means) + 1)]
    return Curve(panel, label, x, list(means), "epoch", "test accuracy, %")
