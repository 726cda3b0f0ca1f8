"""``nusam find-rho``: a short sweep over ρ on data and a model of one's own, or on those of the experiments."""

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import nusam
from nusam.experiments.data import load, split
from nusam.experiments.errors import Refused
from nusam.experiments.figures import LOOKS
from nusam.experiments.files import write_whole
from nusam.experiments.machine import chosen_device
from nusam.experiments.methods import BASES
from nusam.experiments.models import TITLES, build
from nusam.radius_search import RHOS, RadiusSearch, Trial, find_rho

__all__ = ["FindRho", "draw"]

METHODS: dict[str, Callable[..., nusam.SharpnessAware]] = {
    "nusam": nusam.NuSAM,
    "nusam-norm": nusam.NuSAMNorm,
    "sam": nusam.SAM,
    "sam-on": nusam.SAMON,
}


@dataclass(frozen=True)
class FindRho:
    """Suggest ρ for every method by short trainings, and draw the scores.

    FILE.py:FUNCTION names a function without arguments that returns a dict with arguments of nusam.find_rho: model,
    base, loss, loader, validation, and score if the loss is not what counts; methods, radii, steps and seeds are
    options of this command.
    """

    setup: Annotated[str, tyro.conf.Positional] = ""
    """FILE.py:FUNCTION; without it, --model learns --data."""
    model: str = "mixer"
    """As of nusam train."""
    data: str = "digits"
    """As of nusam train."""
    data_root: Path = Path("data")
    """Folder of the data's files."""
    base: str = "adamw"
    """Base optimizer: sgd, adam, adamw or adafactor."""
    learning_rate: float = 4e-3
    """At its highest."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = ("nusam", "sam")
    """nusam, nusam-norm, sam, sam-on."""
    rhos: Annotated[tuple[float, ...], tyro.conf.arg(metavar="RHO ...")] = RHOS
    """Radii that are tried with every method."""
    steps: int = 200
    """Of each training."""
    seeds: int = 2
    """Trainings of every method and radius."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ...; where the model of a setup lies is its own business."""
    out: Path = Path("runs/find-rho")
    """Folder for rho.png and rho.json."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        for method in self.methods:
            if method not in METHODS:
                raise Refused(f"--methods must name some of {', '.join(METHODS)}, got {method}.")
        given = _of_user(self.setup) if self.setup else self._built_in()
        console = Console(markup=False)

        def tell(trial: Trial) -> None:
            rho = f", ρ = {trial.rho:g}" if trial.rho else ""
            console.print(f"{trial.method}{rho}: {trial.score:.4f}", highlight=False)

        methods = [METHODS[method] for method in self.methods]
        try:
            found = find_rho(**given, methods=methods, rhos=self.rhos, steps=self.steps, seeds=self.seeds, report=tell)
        except (TypeError, ValueError, NotImplementedError) as error:
            if _raised_in_nusam(error):
                raise Refused(str(error)) from error
            raise  # out of the setup's own loss or model, where only a traceback helps
        console.print(_table(found))
        self._save(found)
        console.print(f"Saved as {self.out / 'rho.png'} and rho.json.", highlight=False)
        return 0

    def _built_in(self) -> dict[str, Any]:
        for option, allowed in (("model", TITLES), ("base", BASES)):
            if getattr(self, option) not in allowed:
                raise Refused(f"--{option} must be one of {', '.join(allowed)}, got {getattr(self, option)}.")
        device = chosen_device(self.device)
        source = load(self.data, self.data_root)
        data = split(source, 0, device)
        torch.manual_seed(0)
        train, held_out = (TensorDataset(part.pixels, part.labels) for part in (data.train, data.validation))

        def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1])

        return {
            "model": build(self.model, source.image_size, source.channels, source.classes).to(device),
            "base": lambda model: BASES[self.base](model, self.learning_rate, 0.05),
            "loss": loss,
            "loader": DataLoader(train, 32, shuffle=True),
            "validation": DataLoader(held_out, 128),
        }

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


def _of_user(setup: str) -> dict[str, Any]:
    """What the named function returns."""
    path, _, name = setup.rpartition(":")
    if not path or not Path(path).is_file():
        raise Refused(f"SETUP must be FILE.py:FUNCTION with a file that exists, got {setup}.")
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    if specification is None or specification.loader is None:
        raise Refused(f"SETUP must name a Python file, got {path}.")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(Path(path).resolve().parent))
    specification.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"{path} has no function {name}; name one that returns the arguments of nusam.find_rho.")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Refused(f"{setup} must take no arguments ({error}); give them defaults.") from error
    given = function()
    needed = {"model", "base", "loss", "loader", "validation"}
    if not isinstance(given, dict) or not needed <= given.keys() <= needed | {"score", "delay", "warm_up"}:
        has = ", ".join(given) if isinstance(given, dict) else type(given).__name__
        raise Refused(
            f"{setup} must return a dict with {', '.join(sorted(needed))}, and perhaps score, delay or warm_up, got "
            f"{has}."
        )
    return given


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
