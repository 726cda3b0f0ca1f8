"""``nusam sweep``: a grid of runs, each at most once, several at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from nusam.experiments.contest import mean_and_error
from nusam.experiments.data import DATASETS
from nusam.experiments.errors import Refused
from nusam.experiments.filling import ENGINES, fill
from nusam.experiments.machine import chosen_device
from nusam.experiments.methods import METHODS
from nusam.experiments.models import TITLES
from nusam.experiments.store import Cell, Store
from nusam.experiments.training import Recipe, Run

__all__ = ["Sweep"]

T = TypeVar("T")
Values = Annotated[tuple[T, ...], tyro.conf.arg(metavar="VALUE ...")]


@dataclass(frozen=True)
class Sweep:
    """Train every combination of models, methods, radii, delays and seeds that --results does not have yet.

    Stop it whenever you like: finished runs are kept, and the same command goes on.
    """

    models: Values[str] = ("mixer",)
    """Separated by spaces."""
    methods: Values[str] = ("adamw", "sam", "nusam")
    """adamw is the base optimizer alone, once for all radii and delays."""
    rhos: Values[float] = (0.05, 0.1, 0.2)
    """Radii."""
    delays: Values[float] = ()
    """Shares of the steps before the perturbation starts; each method's own unless given."""
    seeds: int = 2
    """How many, from 0."""
    data: str = "digits"
    """As of nusam train."""
    data_root: Path = Path("data")
    """Folder of the data's files."""
    train_size: int | None = None
    """Training images; a few hundred unless given."""
    epochs: int = 40
    """Passes over the training images."""
    learning_rate: float = 4e-3
    """At its highest."""
    results: Path = Path("runs/results")
    """Folder of finished runs, in runs.jsonl."""
    jobs: int | None = None
    """Runs side by side; the number of cores on a processor and 1 elsewhere unless given."""
    engine: str = "local"
    """local, or ray for a cluster (the runs of one call go to its nodes)."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        for option, given, allowed in (
            ("models", self.models, TITLES),
            ("methods", self.methods, METHODS),
            ("data", (self.data,), DATASETS),
            ("engine", (self.engine,), ENGINES),
        ):
            for value in given:
                if value not in allowed:
                    raise Refused(f"--{option} must name some of {', '.join(allowed)}, got {value}.")
        device = chosen_device(self.device)
        jobs = self.jobs or (torch.get_num_threads() if device.type == "cpu" else 1)
        if jobs < 1 or self.seeds < 1 or self.epochs < 1:
            raise Refused("--jobs, --seeds and --epochs must be at least 1.")
        console = Console(markup=False)
        store = Store(self.results)
        cells = self.cells()
        console.print(f"{len(cells)} runs, {sum(cell in store for cell in cells)} of them finished.", highlight=False)
        fill(store, cells, self.data_root, jobs, device, console, self.engine)
        console.print(_table(store, cells))
        return 0

    def cells(self) -> list[Cell]:
        """The grid, in the order in which it is run and kept."""
        recipe = Recipe(self.epochs, learning_rate=self.learning_rate)
        delays: Sequence[float | None] = self.delays or (None,)
        runs = [
            Run(model, method, 0.0, seed) if method == "adamw" else Run(model, method, rho, seed, delay)
            for model, method, rho, delay, seed in product(
                self.models, self.methods, self.rhos, delays, range(self.seeds)
            )
        ]
        return [Cell(self.data, recipe, run, self.train_size) for run in dict.fromkeys(runs)]


def _table(store: Store, cells: list[Cell]) -> Table:
    table = Table(title="Test accuracy of the last epoch, %", box=HORIZONTALS, pad_edge=False)
    for column in ("model", "method", "ρ", "delay", "seeds", "accuracy", "validation"):
        table.add_column(column)
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        run = cell.run
        delay = METHODS[run.method].delay if run.delay is None else run.delay
        rho = f"{run.rho:g}" if run.rho else "–"
        groups.setdefault((TITLES[run.model], METHODS[run.method].title, rho, f"{delay:.0%}"), []).append(cell)
    for group, members in groups.items():
        outcomes = [store[cell] for cell in members]
        accuracies = [
            mean_and_error([100 * value for value in values])
            for values in ([o.test_accuracy for o in outcomes], [o.validation_accuracy for o in outcomes])
        ]
        table.add_row(*group, str(len(members)), *accuracies)
    return table
