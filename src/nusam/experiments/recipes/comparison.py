"""Train what a plan asks for, and show and save what is known: at the end, or after Ctrl-C."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from nusam.experiments.errors import Refused
from nusam.experiments.pages import results
from nusam.experiments.pages.table import StepSeconds, rendered, rows
from nusam.experiments.runs.progress import Bars
from nusam.experiments.runs.rho_selection import Contest, Plan
from nusam.experiments.training.data import Source
from nusam.experiments.training.devices import device_name, jobs_on
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.spec import Outcome, Recipe

__all__ = ["Comparison"]

MOST_JOBS = 8  # each worker takes about half a gigabyte


class Comparison:
    """Methods compared on one data set.

    Args:
        device: its name.
        options: of the command, for the record.
        out: the folder that gets results.json and demo.png.
    """

    def __init__(
        self, source: Source, recipe: Recipe, device: str, plan: Plan, out: Path, options: Mapping[str, Any]
    ) -> None:
        self.source, self.recipe, self.device, self.plan, self.out = source, recipe, device, plan, out
        self.options = options
        self.console = Console(markup=False)
        self.step_seconds: StepSeconds = {}

    def run(self, jobs: int | None) -> int:
        """Do everything, with so many runs side by side, or as many as the device takes; the exit code."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.save()
        except OSError as error:
            raise Refused(f"--out {self.out} can't be written to ({error.strerror}); name another folder.") from error
        try:
            self.train(jobs)
            self.step_seconds = self.measure_steps()
        except KeyboardInterrupt:
            self.conclude()
            return 130
        self.conclude()
        return 0

    def train(self, jobs: int | None) -> None:
        """All runs of the plan, saving after each."""
        import torch

        from nusam.experiments.runs.workers import Workers

        jobs = jobs or min(jobs_on(self.device), MOST_JOBS)
        workers = Workers(min(jobs, self.plan.runs()), self.recipe, self.source, torch.device(self.device))
        bars = Bars(self.console, self.plan.runs(), self.recipe.epochs)
        with bars, workers:
            for report in workers.train(self.plan.pending):
                bars.show(report)
                if isinstance(report.news, Outcome):
                    if self.plan.add(report.news):
                        self.tell_choice(Contest(report.run.model, report.run.method))
                    self.save()

    def measure_steps(self) -> dict[str, dict[str, float]]:
        """Step times of every method with its ρ, and of AdamW to compare with."""
        from nusam.experiments.training.splits import Images, split
        from nusam.experiments.training.step_time import step_seconds

        self.console.print("Measuring step times …")
        train = split(self.source, 0, self.device).train
        size = self.recipe.batch_size
        batch = Images(train.pixels[:size], train.labels[:size])
        seconds = {}
        for model in self.plan.models:
            radii = {contest.method: rho for contest, rho in self.plan.chosen.items() if contest.model == model}
            seconds[model] = step_seconds(
                model, {"adamw": 0.0, **radii}, batch, self.source.classes, self.plan.ascent_share
            )
        return seconds

    def save(self) -> None:
        """Write results.json."""
        facts = {
            "options": self.options,
            "data": {"title": self.source.title, **self.source.sizes},
            "recipe": asdict(self.recipe),
            "device": device_name(self.device),
            "step_seconds": self.step_seconds,
        }
        table = rows(self.plan, self.source.classes, self.step_seconds)
        results.write(self.out / "results.json", facts, self.plan, table)

    def conclude(self) -> None:
        """Save, and show the table and the figure of the finished runs."""
        self.save()
        finished, planned = len(self.plan.outcomes), self.plan.runs()
        if finished < planned:
            self.console.print(f"Stopped after {finished} of {planned} runs; what follows is of these.")
        lines = rows(self.plan, self.source.classes, self.step_seconds)
        if lines:
            self.console.print(rendered(lines, self.title, self.caption))
            from nusam.experiments.pages.figures import learning_curves

            learning_curves(self.plan, self.title, self.out / "demo.png")
        for line in lines:
            if line.collapsed:
                self.console.print(
                    f"! {line.collapsed} of {line.seeds} runs of {TITLES[line.model]} {METHODS[line.method].title} "
                    f"ended near chance: too few epochs, or ρ = {line.rho:g} is too large."
                )
        written = "results.json and demo.png are" if lines else "results.json is"
        self.console.print(f"{written} in {self.out}.", highlight=False)

    def tell_choice(self, contest: Contest) -> None:
        """Why a ρ was chosen."""
        trials = self.plan.trials(contest)
        tried = ", ".join(f"{rho:g}: {fmean(accuracies):.1%}" for rho, accuracies in trials.items())
        name = f"{TITLES[contest.model]} {METHODS[contest.method].title}"
        self.console.print(f"{name}: ρ = {self.plan.chosen[contest]:g} (validation accuracy {tried})")

    @property
    def title(self) -> str:
        """Of the table and the figure."""
        sizes = self.source.sizes
        share = self.plan.ascent_share
        ascents = "" if share == 1 else f", ascents on {share:.3g} of each batch"
        return f"{self.source.title}: {sizes['train']} training images, {self.recipe.epochs} epochs{ascents}"

    @property
    def caption(self) -> str:
        """What a reader of the table needs to know."""
        sizes = self.source.sizes
        rho = "given" if self.options["rho"] is not None else f"chosen on {sizes['validation']} validation images"
        return (
            f"Accuracy in % on {sizes['test']} test images after the last epoch, mean ± s.e. of the seeds; over AdamW: "
            f"of the differences seed by seed. ρ was {rho}. SAM and νSAM start after 10% of the steps, SAM-ON at once. "
            "Step time relative to AdamW's."
        )
