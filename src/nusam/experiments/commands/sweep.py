"""``nusam sweep``: a grid of runs, each at most once, several at a time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from nusam.experiments.errors import Refused
from nusam.experiments.limits import at_least
from nusam.experiments.runs.contest import mean_and_error
from nusam.experiments.runs.filling import ENGINES, fill
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.augmentation import AUGMENTATIONS
from nusam.experiments.training.data import DATASETS, load
from nusam.experiments.training.devices import require_device
from nusam.experiments.training.methods import ALONE, BASES, METHOD_NAMES, METHODS, kept_as, require_one_base, title
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.own import OWN, content_of
from nusam.experiments.training.spec import Recipe, Run

__all__ = ["Sweep"]

T = TypeVar("T")
Values = Annotated[tuple[T, ...], tyro.conf.arg(metavar="VALUE ...")]


@dataclass(frozen=True)
class Sweep:
    """Train every combination of models, methods, radii, delays, shares and seeds that --results does not have yet.

    Stop it whenever you like: finished runs are kept, and the same command goes on.
    """

    models: Values[str] = ("mixer",)
    """Separated by spaces."""
    methods: Values[str] = ("none", "sam", "nusam")
    """As of nusam train; none is the base optimizer alone, once for all radii, delays and shares."""
    rhos: Values[float] = (0.05, 0.1, 0.2)
    """Radii."""
    delays: Values[float] = ()
    """Shares of the steps before the perturbation starts; each method's own unless given."""
    ascent_shares: Values[float] = (1.0,)
    """Shares of each batch that the ascent sees."""
    one_pass: bool = False
    """Let the next step's ascent ride in each step's descent, in the runs of nusam and nusam-norm."""
    seeds: int = 2
    """How many, from 0."""
    data: str = "digits"
    """As of nusam train."""
    data_root: Path = Path("data")
    """Folder of the data's files."""
    download: bool = False
    """Fetch what is missing."""
    train_size: int | None = None
    """Training images; a few hundred unless given."""
    wrong_labels: float = 0.0
    """Share of the labels for training and validation that are drawn anew."""
    base: str = "adamw"
    """Base optimizer: sgd, adam, adamw or adafactor."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 32
    """Images of a step."""
    learning_rate: float = 4e-3
    """At its highest: linear warm-up, then cosine."""
    weight_decay: float = 0.05
    """Of the base optimizer."""
    augment: str = "none"
    """none, crop, crop-flip or crop-flip-autoaugment."""
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
        self._check()
        files = ""
        if self.data in OWN:
            files = content_of(self.data, load(self.data, self.data_root, self.train_size, self.download))
        cells = self.cells(files)
        require_device(self.device)
        console = Console(markup=False)
        store = Store(self.results)
        console.print(f"{len(cells)} runs, {sum(cell in store for cell in cells)} of them finished.", highlight=False)
        fill(store, cells, self.data_root, self.jobs, self.device, console, self.engine, self.download)
        console.print(_table(store, cells))
        return 0

    def cells(self, files: str = "") -> list[Cell]:
        """The grid, in the order in which it is run and kept; ``files``: what data of one's own are.

        Raises:
            Refused: if a number is not one that a run or a recipe can have.
        """
        delays: Sequence[float | None] = self.delays or (None,)
        recipe = Recipe(
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.weight_decay,
            base=self.base,
            augment=self.augment,
            wrong_labels=self.wrong_labels,
        )
        runs = [
            Run(model, method, 0.0, seed)
            if method == ALONE
            else Run(
                model,
                method,
                rho,
                seed,
                delay,
                ascent_share=share,
                one_pass=self.one_pass and METHODS[method].low_rank,
            )
            for model, method, rho, delay, share, seed in product(
                self.models, map(kept_as, self.methods), self.rhos, delays, self.ascent_shares, range(self.seeds)
            )
        ]
        return [Cell(self.data, recipe, run, self.train_size, files=files) for run in dict.fromkeys(runs)]

    def _check(self) -> None:
        choices: dict[str, tuple[Sequence[str], Collection[str]]] = {
            "models": (self.models, TITLES),
            "methods": (self.methods, METHOD_NAMES),
            "data": ([self.data], DATASETS),
            "base": ([self.base], BASES),
            "augment": ([self.augment], AUGMENTATIONS),
            "engine": ([self.engine], ENGINES),
        }
        for option, (given, allowed) in choices.items():
            unknown = [value for value in given if value not in allowed] or ([] if given else ["nothing"])
            if unknown:
                must = "name some of" if option in ("models", "methods") else "be one of"
                raise Refused(f"--{option} must {must} {', '.join(allowed)}, got {unknown[0]}.")
        for method in self.methods:
            require_one_base("methods", method, self.base)
        if self.one_pass and not any(METHODS[kept_as(method)].low_rank for method in self.methods):
            raise Refused(
                f"--one-pass is for nusam and nusam-norm, got {', '.join(self.methods)}; leave it out, or name one of "
                "them in --methods."
            )
        if not self.rhos:
            raise Refused("--rhos must give at least one radius, got nothing.")
        if not self.ascent_shares:
            raise Refused("--ascent-shares must give at least one share, got nothing.")
        at_least(0, train_size=self.train_size)
        at_least(1, jobs=self.jobs, seeds=self.seeds)


def _table(store: Store, cells: list[Cell]) -> Table:
    table = Table(title="Test accuracy of the last epoch, %", box=HORIZONTALS, pad_edge=False)
    for column in ("model", "method", "ρ", "delay", "share", "seeds", "accuracy", "validation"):
        table.add_column(column)
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        run = cell.run
        delay = METHODS[run.method].delay if run.delay is None else run.delay
        rho = f"{run.rho:g}" if run.rho else "–"
        method = title(run.method, cell.recipe.base) + (", one pass" if run.one_pass else "")
        share = "–" if run.method == ALONE else f"{run.ascent_share:g}"
        groups.setdefault((TITLES[run.model], method, rho, f"{delay:.0%}", share), []).append(cell)
    for group, members in groups.items():
        outcomes = [store[cell] for cell in members]
        accuracies = [
            mean_and_error([100 * value for value in values])
            for values in ([o.test_accuracy for o in outcomes], [o.validation_accuracy for o in outcomes])
        ]
        table.add_row(*group, str(len(members)), *accuracies)
    return table
