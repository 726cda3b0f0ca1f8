"""What the tables and figures of the paper have in common: scales, settings, and a bench to run cells on."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from rich.console import Console

from nusam.experiments.contest import Setting
from nusam.experiments.data import load
from nusam.experiments.filling import fill
from nusam.experiments.result import Curve, Result
from nusam.experiments.results import device_name
from nusam.experiments.store import Cell, Store
from nusam.experiments.training import Recipe

__all__ = ["SCALES", "Bench", "Experiment", "Scale"]


@dataclass(frozen=True)
class Scale:
    """How large an experiment is: data, models, seeds and the recipe of every run.

    Attributes:
        ours: what the paper's text does not give, and this project chose.
        on_request: data that are run only where they are named.
    """

    data: tuple[str, ...]
    models: tuple[str, ...]
    recipes: dict[str, Recipe]  # by data
    seeds: dict[str, int]
    train_size: dict[str, int | None]
    trial_seeds: int = 2
    one_radius: bool = False  # the first candidate instead of a choice
    ours: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()


SCALES = {
    "smoke": Scale(
        data=("digits",),
        models=("mixer",),
        recipes={"digits": Recipe(epochs=2)},
        seeds={"digits": 2},
        train_size={"digits": 64},
        one_radius=True,
        ours=("all: seconds of a run that tests the pipeline and nothing else",),
    ),
    "cpu": Scale(
        data=("digits", "fashion-mnist"),
        models=("mixer", "vit"),
        recipes={"digits": Recipe(epochs=40), "fashion-mnist": Recipe(epochs=20), "cifar10": Recipe(epochs=20)},
        seeds={"digits": 8, "fashion-mnist": 3, "cifar10": 3},
        train_size={"digits": 300, "fashion-mnist": 500, "cifar10": 2000},
        on_request=("cifar10",),
        ours=(
            "data, models (width 64, depth 2, 4 × 4 patches), epochs, batch size 32, learning rate 4e-3, weight decay "
            "0.05, warm-up 10%, candidates for ρ, the choice of ρ by validation accuracy over two of the seeds",
        ),
    ),
    "full": Scale(
        data=("cifar10", "cifar100"),
        models=("mixer-s/4", "mixer-b/4", "vit-s/4", "vit-b/4"),
        recipes={
            name: Recipe(
                epochs=300, batch_size=256, learning_rate=1e-3, warm_up=1 / 30, augment="crop-flip-autoaugment"
            )
            for name in ("cifar10", "cifar100")
        },
        seeds={"cifar10": 3, "cifar100": 3},
        train_size={"cifar10": 0, "cifar100": 0},
        ours=(
            "epochs, batch size 256, learning rate 1e-3, weight decay 0.05 and 10 epochs of warm-up (of Gani et al. "
            "2022, on which the paper builds), seeds, 1,000 validation images, candidates for ρ",
        ),
    ),
}


@dataclass
class Bench:
    """Where an experiment runs: a store of finished runs, and how to fill it."""

    store: Store
    scale_name: str
    data: str
    data_root: Path
    jobs: int
    device: torch.device
    console: Console
    began: float = field(default_factory=time.perf_counter)
    made: set[Cell] = field(default_factory=set)  # runs made here
    found: set[Cell] = field(default_factory=set)  # runs that the store had

    @property
    def scale(self) -> Scale:
        """Of the experiment."""
        return SCALES[self.scale_name]

    def fill(self, cells: Iterable[Cell]) -> None:
        """Run what the store lacks."""
        cells = list(cells)
        self.found.update(cell for cell in cells if cell in self.store and cell not in self.made)
        self.made.update(cell for cell in cells if cell not in self.found)
        fill(self.store, cells, self.data_root, self.jobs, self.device, self.console)

    def settings(self, **changes: Any) -> list[Setting]:
        """One for each model, with changes to the recipe."""
        scale = self.scale
        recipe = replace(scale.recipes[self.data], **changes)
        return [
            Setting(self.data, model, recipe, scale.seeds[self.data], scale.trial_seeds, scale.train_size[self.data])
            for model in scale.models
        ]

    def result(
        self,
        experiment: "Experiment",
        title: str,
        columns: list[str],
        rows: list[dict[str, Any]],
        curves: list[Curve] | None = None,
        findings: str = "",
        recipe: Recipe | None = None,
    ) -> Result:
        """What the experiment came to, with where and how."""
        notes = [f"Ours: {what}." for what in self.scale.ours] + list(experiment.notes)
        if self.data == "cifar10":  # the original or a copy, as the files say
            notes.append(f"Data: {load(self.data, self.data_root, self.scale.train_size[self.data]).title}.")
        return Result(
            name=experiment.name,
            title=title,
            scale=self.scale_name,
            data=self.data,
            columns=columns,
            rows=rows,
            curves=curves or [],
            findings=findings,
            notes=notes,
            circumstances={"recipe": asdict(recipe or self.scale.recipes[self.data])},
        )

    def circumstances(self) -> dict[str, Any]:
        """Where, when and with what."""
        runs = f"{len(self.made)} made here, {len(self.found)} found finished"
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "date": date.today().isoformat(),
            "python": python_version(),
            **{name: version(name) for name in ("nusam", "torch", "timm")},
            "command": " ".join(["nusam", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - self.began, 1),
            **({"runs": runs} if self.made | self.found else {}),
        }


class Experiment(ABC):
    """A table or figure of the paper."""

    name: str
    title: str
    needs: str  # beyond what is embedded
    takes: dict[str, str]  # by scale, about how long
    notes: tuple[str, ...] = ()

    def data(self, scale: str) -> tuple[str, ...]:
        """What it is run on at a scale; of an experiment without data, one empty name."""
        return SCALES[scale].data

    def on_request(self, scale: str) -> tuple[str, ...]:
        """What it is run on if --data names it."""
        return SCALES[scale].on_request if self.data(scale) == SCALES[scale].data else ()

    @abstractmethod
    def run(self, bench: Bench) -> Result:
        """Run what is missing and draw the conclusions."""
