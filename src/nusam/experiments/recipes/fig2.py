"""Figures 2 and 4: accuracy over ρ."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, SAM_ON
from nusam.experiments.runs.contest import Contender, Contest, Setting, mean_and_error, mean_and_half_width
from nusam.experiments.training.models import TITLES

_RADII = {
    "mixer": {"sam": (0.05, 0.1, 0.2, 0.4, 0.8), "nusam": (0.02, 0.05, 0.1, 0.2, 0.4), "sam-on": (0.5, 1.0, 2.0)},
    "vit": {"sam": (0.02, 0.05, 0.1, 0.2, 0.4), "nusam": (0.003, 0.01, 0.03, 0.1, 0.2), "sam-on": (0.3, 1.0, 3.0)},
}


@dataclass(frozen=True)
class RadiusSweep(Experiment):
    """Every ρ on every seed."""

    name: str
    title: str
    paper: str
    needs: str = ""
    notes: tuple[str, ...] = ("At the small scales without random crops: the recipe of Table 3, not of Table 2.",)
    published: Mapping[str, Any] = field(default_factory=lambda: Experiment.published)

    @property
    def takes(self) -> dict[str, str]:  # type: ignore[override]
        """About how long."""
        return {"smoke": "10 s", "cpu": "20 min", "full": "weeks of a GPU"}

    def run(self, bench: Bench) -> Result:
        """Run and draw."""
        rows, curves = [], []
        settings = self.settings(bench)
        for setting in settings:
            small = "mixer" if "mixer" in setting.model else "vit"
            radii = _RADII[small]
            if bench.scale.one_radius:
                radii = {method: values[:2] for method, values in radii.items()}
            contest = Contest(replace(setting, radii=radii), (ADAMW, SAM, SAM_ON, NUSAM))
            tried = [(c, rho) for c in contest.contenders.values() for rho in contest.setting.candidates(c)]
            bench.fill(contest.setting.cell(*pair, seed) for pair in tried for seed in range(setting.seeds))
            for contender in contest.contenders.values():
                accuracies = {
                    rho: self._accuracies(bench, contest, contender, rho)
                    for rho in contest.setting.candidates(contender)
                }
                for rho, values in accuracies.items():
                    row = {"model": TITLES[setting.model], "method": contender.label, "ρ": f"{rho:g}" if rho else "–"}
                    rows.append({**row, "last iterate": mean_and_error(values), "lowest seed": f"{min(values):.2f}"})
                x = list(accuracies) if contender is not ADAMW else [min(radii["nusam"]), max(radii["sam-on"])]
                ys = list(accuracies.values()) if contender is not ADAMW else 2 * [accuracies[0.0]]
                halves = [mean_and_half_width(values)[1] for values in ys]
                curves.append(
                    Curve(
                        TITLES[setting.model],
                        contender.label,
                        x,
                        [fmean(values) for values in ys],
                        "ρ",
                        "test accuracy, %",
                        error=[half if half < 100 else 0.0 for half in halves],
                        log_x=True,
                    )
                )
        findings = f"The paper: {self.paper} Bands are 95% intervals over the seeds."
        shown = "the radii, all of which are shown on all seeds: none is chosen"
        return bench.result(self, self.title, list(rows[0]), rows, curves, findings, settings[0], shown)

    def settings(self, bench: Bench) -> list[Setting]:
        """What is swept on: one for each model of the scale."""
        return bench.settings(self)

    def _accuracies(self, bench: Bench, contest: Contest, contender: Contender, rho: float) -> list[float]:
        seeds = range(contest.setting.seeds)
        return [100 * bench.store[contest.setting.cell(contender, rho, seed)].test_accuracy for seed in seeds]


FIGURE = RadiusSweep(
    "fig2",
    "Accuracy over ρ",
    "a sweep over ρ for the results of Table 2; its plots are not in our text, nor which configurations it shows.",
)
