"""Progress bars: one for all runs together, one for the run of each worker."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nusam.experiments.training.methods import title
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.spec import Epoch, Report, Run

__all__ = ["Bars", "describe"]


class Bars(Progress):
    """Shows the reports of :class:`nusam.experiments.runs.workers.Workers` with loss, score and time left."""

    def __init__(self, console: Console, runs: int, epochs: int, base: str = "adamw") -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        super().__init__(*columns, console=console, speed_estimate_period=60)
        self._runs, self._epochs, self._base, self._finished = runs, epochs, base, 0
        self._all = self.add_task("all runs", total=runs * epochs, news=f"0 of {runs} finished")
        self._bars: dict[int, TaskID] = {}

    def show(self, report: Report) -> None:
        """Move the bars."""
        if not isinstance(report.news, Epoch):
            self._finished += 1
            self.update(self._all, news=f"{self._finished} of {self._runs} finished")
            self.remove_task(self._bars.pop(report.worker))
            return
        if report.worker not in self._bars:
            name = describe(report.run, self._base)
            self._bars[report.worker] = self.add_task(name, total=self._epochs, news="")
        self.update(self._bars[report.worker], advance=1, news=str(report.news))
        self.advance(self._all)


def describe(run: Run, base: str = "adamw") -> str:
    """A run in a reader's words."""
    rho = f" ρ={run.rho:g}" if run.rho else ""
    return f"{TITLES[run.model]} {title(run.method, base)}{rho}, seed {run.seed}"
