"""Figure 3: the perturbation delay."""

from dataclasses import replace
from statistics import fmean

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.runs.contest import Contender, Contest, mean_and_error, mean_and_half_width
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES

DELAYS = (0.0, 0.1, 0.25, 0.5)


class Figure3(Experiment):
    """SAM and νSAM with every delay and every ρ."""

    name = "fig3"
    title = "Delaying the perturbation"
    needs = ""
    takes = {"smoke": "10 s", "cpu": "20 min", "full": "weeks of a GPU"}  # noqa: RUF012
    notes = (
        "The paper's figure is of ViT-S/4 on CIFAR-10 over 300 epochs, as the full scale is; its plots are not in our "
        "text, which says that both SAM and νSAM benefit from a delay beyond the warm-up, and that νSAM's best ρ grows "
        "with it. At the small scales, the Mixer only.",
    )
    published = {"augment": "crop-flip-autoaugment", "epochs": 300, "seeds": 3}  # noqa: RUF012
    models_of_paper = ("vit-s/4",)
    data_of_paper = ("cifar10",)

    def run(self, bench: Bench) -> Result:
        """Run and draw: the best ρ and its accuracy for every delay."""
        setting = bench.settings(self)[0]
        setting = replace(setting, trial_seeds=setting.seeds)
        delays = DELAYS[:2] if bench.scale.one_radius else DELAYS
        rows, curves, bracketed = [], [], []
        for method in ("sam", "nusam"):
            radii = METHODS[method].radii["mixer" if "mixer" in setting.model else "vit"]
            radii = radii[:1] if bench.scale.one_radius else radii
            own = METHODS[method].delay  # whose runs other experiments have made
            contenders = [Contender(f"{d:.0%}", method, {} if d == own else {"delay": d}) for d in delays]
            contest = Contest(replace(setting, radii={method: radii}), contenders)
            bench.fill(contest.trials())
            best: list[float] = []
            accuracies: list[list[float]] = []
            for contender in contenders:
                best.append(contest.radius(bench.store, contender.label))
                accuracies.append([100 * o.test_accuracy for o in contest.outcomes(bench.store, contender.label)])
                rows.append(
                    {
                        "model": TITLES[setting.model],
                        "method": METHODS[method].title,
                        "delay": contender.label,
                        "best ρ": f"{best[-1]:g}",
                        "last iterate": mean_and_error(accuracies[-1]),
                    }
                )
                bracketed.append(contest.bracketed(bench.store, contender.label))
            title, x = METHODS[method].title, [100 * delay for delay in delays]
            halves = [mean_and_half_width(values)[1] for values in accuracies]
            errors = [half if half < 100 else 0.0 for half in halves]
            means: list[float | None] = [fmean(values) for values in accuracies]
            curves.append(
                Curve("Accuracy with the best ρ", title, x, means, "delay, % of the steps", "test accuracy, %", errors)
            )
            curves.append(Curve("The best ρ", title, x, list(best), "delay, % of the steps", "ρ", log_y=True))
        findings = "\n".join(
            f"- {row['method']}, delay {row['delay']}: {row['last iterate']} % with ρ = {row['best ρ']}"
            f"{'' if inside else ', which is not bracketed: an end of what was tried'}."
            for row, inside in zip(rows, bracketed, strict=True)
        )
        choice = bench.choice_of_radius(self, contest)
        return bench.result(self, self.title, list(rows[0]), rows, curves, findings, setting, choice)


FIGURE = Figure3()
