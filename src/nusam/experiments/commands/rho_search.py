"""The search for ρ that ``nusam find-rho`` asks for: its trainings, its table, its figure and what it leaves."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nusam
from nusam.experiments.errors import Refused
from nusam.experiments.files import save_whole, write_json
from nusam.experiments.pages.radius_figure import draw
from nusam.experiments.training.building import build
from nusam.experiments.training.data import Source
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.methods import METHODS as KNOWN
from nusam.experiments.training.scoring import loss as loss_of
from nusam.experiments.training.scoring import score
from nusam.experiments.training.splits import split
from nusam.tools.radius_search import RadiusSearch, find_rho
from nusam.tools.verdict import Trial, Verdict

__all__ = ["RhoSearch", "built_in"]


def built_in(source: Source, model: str, base: str, learning_rate: float, device: str) -> dict[str, Any]:
    """The arguments of :func:`nusam.find_rho` for a model of the experiments."""
    data = split(source, 0, device)
    torch.manual_seed(0)
    train, held_out = (TensorDataset(part.pixels, part.labels) for part in (data.train, data.validation))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return loss_of(model(batch[0]), batch[1])

    return {
        "model": build(model, source.image_size, source.channels, source.classes).to(device),
        "base": lambda model: BASES[base].make(model, learning_rate, 0.05),
        "loss": loss,
        "loader": DataLoader(train, 32, shuffle=True),
        "validation": DataLoader(held_out, 128),
        "score": lambda model: 100 * score(model, data.validation, source.metric),
    }


@dataclass(frozen=True)
class RhoSearch:
    """What the options of the command say, whatever is trained.

    ``out`` gets rho.json, rho.png and, of a verdict, best.pt.
    """

    methods: Sequence[str]
    rhos: Sequence[float] | None
    ascent_shares: Sequence[float]
    one_pass: bool
    steps: int
    seeds: int
    confirm: int
    out: Path

    def run(self, given: dict[str, Any]) -> int:
        """Train, show and save; the exit code.

        Args:
            given: the other arguments of :func:`nusam.find_rho`.
        """
        console = Console(markup=False)

        def tell(trial: Trial) -> None:
            steps = f", {trial.steps} steps" if trial.steps != self.steps else ""
            console.print(f"{trial.label}{steps}: {trial.score:.4f}", highlight=False)

        methods = [getattr(nusam, KNOWN[method].kind) for method in self.methods]
        try:
            options: Any = {"rhos": self.rhos, "ascent_share": self.ascent_shares, "steps": self.steps}
            options |= {"one_pass": self.one_pass, "seeds": self.seeds, "confirm": self.confirm}
            found = find_rho(**given, **options, methods=methods, report=tell)
        except (TypeError, ValueError, NotImplementedError) as error:
            if _raised_in_nusam(error):
                raise Refused(str(error)) from error
            raise  # out of the setup's own loss or model, where only a traceback helps
        self._save(found)
        console.print(_table(found))
        if found.verdict:
            console.print(f"\n{found.verdict}\n\n{_basis(found.verdict)}", highlight=False)
        best = f", rho.json and best.pt, from which {self._kept(found.verdict)} goes on" if found.verdict else ""
        console.print(f"Saved as {self.out / 'rho.png'}{best or ' and rho.json'}.", highlight=False)
        return 0

    def _kept(self, verdict: Verdict) -> str:
        return (verdict.trial if verdict.helps else verdict.base).label

    def _save(self, found: RadiusSearch) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            content = {
                "command": " ".join(["nusam", *sys.argv[1:]]),
                "suggestions": found.suggestions,
                "verdict": found.verdict and _told(found.verdict),
                "trials": [asdict(trial) for trial in (found.base, *found.trials)],
                "base at equal seconds": [asdict(trial) for trial in found.at_equal_seconds.values()],
            }
            write_json(self.out / "rho.json", content)
            draw(found, self.out / "rho.png")
            if found.verdict:
                states = {"model": found.verdict.weights, "optimizer": found.verdict.optimizer_state}
                save_whole(self.out / "best.pt", {"what": self._kept(found.verdict), **states})
        except OSError as error:
            raise Refused(f"--out {self.out} can't be written to ({error.strerror}); name another folder.") from error


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "sentence": str(verdict),
        "helps": verdict.helps,
        "bracketed": verdict.bracketed,
        "gain": verdict.gain.mean,
        "half of its 95% interval": verdict.gain.half_width,
        "price": verdict.price,
        "trial": asdict(verdict.trial),
        "base": asdict(verdict.base),
    }


def _basis(verdict: Verdict) -> str:
    return (
        f"Over {len(verdict.trial.scores)} seeds that took no part in the choice, in pairs, with the 95% interval; the "
        f"base optimizer had the better of as many steps and as many seconds, {verdict.base.steps} steps beside "
        f"{verdict.trial.steps}."
    )


def _raised_in_nusam(error: Exception) -> bool:
    *_, (raised_in, _) = walk_tb(error.__traceback__)
    return Path(raised_in.f_code.co_filename).is_relative_to(Path(nusam.__file__).parent)


def _table(found: RadiusSearch) -> Table:
    table = Table(title="Score of short trainings", box=HORIZONTALS, pad_edge=False)
    for column in ("method", "best ρ", "score", "base alone", "gain", "take"):
        table.add_column(column)
    for trials in found.lines:
        best = max(trials, key=lambda trial: trial.score)
        over = found.gain(best)
        if not math.isfinite(max(best.score, found.rival(best).score)):
            take = "no training ended in a finite score: lower the learning rate"
        elif over.mean > 0:
            take = f"ρ = {best.rho:g}" + ("" if found.bracketed(best) else ", not bracketed")
        else:
            take = "none of these"
        name, scores = best.label.partition(",")[0], (f"{best.score:.4f}", f"{found.rival(best).score:.4f}")
        table.add_row(name, f"{best.rho:g}", *scores, str(over), take)
    return table
