"""The search for ρ that ``nusam find-rho`` asks for: its trainings, its table, its figure and what it leaves."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import nusam
from nusam.experiments.errors import Refused
from nusam.experiments.files import write_whole
from nusam.experiments.pages.looks import LOOKS
from nusam.experiments.training.building import build
from nusam.experiments.training.data import Source
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.methods import METHODS as KNOWN
from nusam.experiments.training.splits import split
from nusam.tools.radius_search import RadiusSearch, Trial, find_rho

__all__ = ["RhoSearch", "built_in", "draw"]


def built_in(source: Source, model: str, base: str, learning_rate: float, device: str) -> dict[str, Any]:
    """The arguments of :func:`nusam.find_rho` for a model of the experiments."""
    data = split(source, 0, device)
    torch.manual_seed(0)
    train, held_out = (TensorDataset(part.pixels, part.labels) for part in (data.train, data.validation))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    return {
        "model": build(model, source.image_size, source.channels, source.classes).to(device),
        "base": lambda model: BASES[base].make(model, learning_rate, 0.05),
        "loss": loss,
        "loader": DataLoader(train, 32, shuffle=True),
        "validation": DataLoader(held_out, 128),
    }


@dataclass(frozen=True)
class RhoSearch:
    """What the options of the command say, whatever is trained; ``out`` gets rho.json and rho.png."""

    methods: Sequence[str]
    rhos: Sequence[float]
    ascent_share: float
    one_pass: bool
    steps: int
    seeds: int
    out: Path

    def run(self, given: dict[str, Any]) -> int:
        """Train, show and save; the exit code.

        Args:
            given: the other arguments of :func:`nusam.find_rho`.
        """
        console = Console(markup=False)

        def tell(trial: Trial) -> None:
            rho = f", ρ = {trial.rho:g}" if trial.rho else ""
            console.print(f"{trial.method}{rho}: {trial.score:.4f}", highlight=False)

        methods = [getattr(nusam, KNOWN[method].kind) for method in self.methods]
        try:
            options: Any = {"rhos": self.rhos, "ascent_share": self.ascent_share, "steps": self.steps}
            options["one_pass"] = self.one_pass
            found = find_rho(**given, **options, methods=methods, seeds=self.seeds, report=tell)
        except (TypeError, ValueError, NotImplementedError) as error:
            if _raised_in_nusam(error):
                raise Refused(str(error)) from error
            raise  # out of the setup's own loss or model, where only a traceback helps
        console.print(_table(found))
        self._save(found)
        console.print(f"Saved as {self.out / 'rho.png'} and rho.json.", highlight=False)
        return 0

    def _save(self, found: RadiusSearch) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            content = {
                "command": " ".join(["nusam", *sys.argv[1:]]),
                "suggestions": found.suggestions,
                # JSON has no infinity, which the score of a diverged training is
                "trials": [
                    {**asdict(t), "scores": [s if math.isfinite(s) else None for s in t.scores]}
                    for t in (found.base, *found.trials)
                ],
            }
            write_whole(self.out / "rho.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
            draw(found, self.out / "rho.png")
        except OSError as error:
            raise Refused(f"--out {self.out} can't be written to ({error.strerror}); name another folder.") from error


def _raised_in_nusam(error: Exception) -> bool:
    *_, (raised_in, _) = walk_tb(error.__traceback__)
    return Path(raised_in.f_code.co_filename).is_relative_to(Path(nusam.__file__).parent)


def _table(found: RadiusSearch) -> Table:
    table = Table(title="Score of short trainings", box=HORIZONTALS, pad_edge=False)
    for column in ("method", "best ρ", "its score", "base optimizer alone", "take"):
        table.add_column(column)
    for method, rho in found.suggestions.items():
        best = found.suggestion(method)
        if not math.isfinite(max(best.score, found.base.score)):
            take = "no training ended in a finite score: lower the learning rate"
        else:
            take = f"ρ = {rho:g}" if rho else "none of these: the base optimizer alone did better"
        table.add_row(method, f"{best.rho:g}", f"{best.score:.4f}", f"{found.base.score:.4f}", take)
    return table


def draw(found: RadiusSearch, path: Path) -> None:
    """Mean score over ρ, a line for each method with a dot for each seed, and the base optimizer alone as a level."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for method, (colour, dashes) in zip(found.suggestions, list(LOOKS.values())[1:], strict=False):
        trials = [trial for trial in found.trials if trial.method == method]
        rhos = [trial.rho for trial in trials]
        axes.plot(rhos, [_drawn(trial.score) for trial in trials], color=colour, linestyle=dashes, label=method)
        for seed in range(len(found.base.scores)):
            axes.plot(rhos, [_drawn(trial.scores[seed]) for trial in trials], ".", color=colour, alpha=0.6)
    axes.axhline(_drawn(found.base.score), color="#000000", linestyle=(0, (1, 1)), label="base optimizer alone")
    every = [trial.rho for trial in found.trials]
    axes.set_xscale("log")
    axes.set_xlim(min(every) / 1.2, max(every) * 1.2)
    axes.set_xlabel("ρ")
    axes.set_ylabel("score on held-out data")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _drawn(score: float) -> float:
    """A gap in the line for a training that diverged."""
    return score if math.isfinite(score) else math.nan
