"""``nusam reproduce``: a table or figure of the paper at a scale that a machine allows."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from nusam.experiments.errors import Refused
from nusam.experiments.pages.result import Result, read_all
from nusam.experiments.pages.table import show
from nusam.experiments.recipes.experiment import SCALES, Bench, Experiment
from nusam.experiments.runs.store import Store
from nusam.experiments.training.devices import require_device

__all__ = ["NAMES", "Reproduce", "experiment"]

NAMES = (
    *("table1", "table2", "table3", "table4", "table5", "table8", "table9", "table10", "table13", "table14"),
    *("fig1", "fig2", "fig3", "fig4", "fig5"),
)
STUDY = "study"


def experiment(name: str) -> Experiment:
    """The recipe of a table or figure.

    Raises:
        Refused: if there is none of that name.
    """
    every = (*NAMES, STUDY)
    if name not in every:
        raise Refused(
            f"nusam reproduce needs one of {', '.join(every)}, got {name or 'nothing'}; --list describes them."
        )
    module = import_module(f"nusam.experiments.recipes.{name}")
    found: Experiment = module.FIGURE if name.startswith("fig") else module.TABLE
    return found


@dataclass(frozen=True)
class Reproduce:
    """Run one of the paper's experiments, as far as the results folder lacks its runs, and save what it came to.

    Ctrl-C keeps every finished run; the same command goes on. --list says what there is, and what has been run.
    """

    name: Annotated[str, tyro.conf.Positional] = ""
    """table1, table2, ..., fig1, ..."""
    scale: str = "cpu"
    """smoke tests the pipeline, cpu takes up to two hours on two cores, desk (the study) a day, full is the paper's."""
    data: str | None = None
    """One of the scale's data sets instead of all; at the cpu scale also cifar10, which is not run unless named."""
    data_root: Path = Path("data")
    """Folder of data sets that are not embedded."""
    download: bool = False
    """Fetch what is missing."""
    results: Path = Path("runs/results")
    """Folder of finished runs (runs.jsonl) and of what experiments came to (*.json)."""
    jobs: int | None = None
    """Runs side by side; the number of cores on a processor and 1 elsewhere unless given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    list: bool = False
    """Describe every experiment: what it needs, how long it takes, what has been run."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        console = Console(markup=False)
        if self.list:
            console.print(_catalogue(self.results))
            return 0
        wanted = experiment(self.name)
        if self.scale not in SCALES or self.scale not in wanted.takes:
            raise Refused(f"--scale must be one of {', '.join(wanted.takes)}, got {self.scale}.")
        if self.jobs is not None and self.jobs < 1:
            raise Refused(f"--jobs must be at least 1, got {self.jobs}.")
        every = wanted.data(self.scale)
        known = every + wanted.on_request(self.scale)
        if self.data is not None and self.data not in known:
            raise Refused(f"--data must be one of {', '.join(filter(None, known)) or 'none'} here, got {self.data}.")
        require_device(self.device)
        store = Store(self.results)
        for data in every if self.data is None else (self.data,):
            bench = Bench(store, self.scale, data, self.data_root, self.jobs, self.device, console, self.download)
            with store.locked() if data else nullcontext():
                result = wanted.run(bench)
                result = replace(result, circumstances={**bench.circumstances(), **result.circumstances})
                show(result, console)
                console.print(f"Saved as {self._saved(result)}.", highlight=False)
        return 0

    def _saved(self, result: Result) -> Path:
        try:
            return result.write(self.results)
        except OSError as error:
            raise Refused(
                f"{result.file_name} could not be written to the results folder {self.results} ({error.strerror}); put "
                "that right and run the command again: what was finished is kept."
            ) from error


def _catalogue(folder: Path) -> Table:
    done = read_all(folder) if folder.is_dir() else []
    table = Table(title="The paper's experiments", box=HORIZONTALS, pad_edge=False)
    for column in ("name", "what", "needs", "takes", f"run, in {folder}"):
        table.add_column(column)
    for name in (*NAMES, STUDY):
        known = experiment(name)
        takes = "\n".join(f"{scale}: {time}" for scale, time in known.takes.items())
        found = [f"{r.scale} {r.data} ({r.circumstances.get('date')})" for r in done if r.name == name]
        table.add_row(name, known.title, known.needs or "–", takes, "\n".join(found) or "–")
    return table
