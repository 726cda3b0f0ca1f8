"""Run the cells that a store lacks, several at a time, and add them in the order they were asked for."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from nusam.experiments.errors import Refused
from nusam.experiments.runs.progress import Bars, describe
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.augmentation import require_images
from nusam.experiments.training.data import Source, load, with_wrong_labels
from nusam.experiments.training.devices import jobs_on
from nusam.experiments.training.models import require_fit
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Report, Run

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINES", "fill"]


def fill(
    store: Store,
    cells: Iterable[Cell],
    data_root: Path,
    jobs: int | None,
    device: str,
    console: Console,
    engine: str = "local",
    download: bool = False,
    told: set[str] | None = None,
) -> None:
    """Run what is missing, so many runs side by side, or as many as the device takes.

    A finished run is added when all before it are, so the store is the same wherever it was interrupted. torch is
    waited for when what the runs need has been found. Of the data is said what ``told`` does not
    hold yet.

    Raises:
        Refused: if another process fills the store, or something that the runs need is not at hand.
    """
    asked, told = list(dict.fromkeys(cells)), set() if told is None else told
    if all(cell in store for cell in asked):
        return

    def alike(cell: Cell) -> tuple[Any, ...]:
        return cell.data, cell.train_size, cell.recipe, cell.pretrained

    with store.locked():
        missing = [cell for cell in asked if cell not in store]
        for (data, size, recipe, pretrained), group in groupby(missing, alike):
            wanted = deque(group)
            source = with_wrong_labels(load(data, data_root, size, download), recipe.wrong_labels)
            require_images(recipe.augment, data, source.channels)
            for note in source.notes:
                if note not in told:
                    told.add(note)
                    console.print(note, highlight=False)
            for cell in wanted:
                require_fit(cell.run.model, source.image_size, source.channels)
            import torch

            job = Job(recipe, source, torch.device(device), store.pretrained(pretrained) if pretrained else None)
            done: dict[Run, Outcome] = {}
            runs = [cell.run for cell in wanted]
            for outcome in ENGINES[engine](job, runs, jobs or jobs_on(device), console):
                done[outcome.run] = outcome
                while wanted and wanted[0].run in done:
                    cell = wanted.popleft()
                    store.add(cell, done.pop(cell.run), device)


class Job(NamedTuple):
    """What the runs of a group share."""

    recipe: Recipe
    source: Source
    device: "torch.device"
    initial: "dict[str, torch.Tensor] | None"


def _in_workers(job: Job, runs: list[Run], jobs: int, console: Console) -> Iterator[Outcome]:
    """In processes of this machine, in the order they finish; a single job needs no process of its own."""
    if min(jobs, len(runs)) == 1:
        yield from _here(job, runs, console)
        return
    from nusam.experiments.runs.workers import Workers

    workers = Workers(min(jobs, len(runs)), *job)
    with Bars(console, len(runs), job.recipe.epochs, job.recipe.base) as bars, workers:
        for report in workers.train(deque(runs)):
            bars.show(report)
            if isinstance(report.news, Outcome):
                yield report.news


def _here(job: Job, runs: list[Run], console: Console) -> Iterator[Outcome]:
    from nusam.experiments.training.loop import train

    with Bars(console, len(runs), job.recipe.epochs, job.recipe.base) as bars:
        for run in runs:

            def show(news: Epoch | Outcome, run: Run = run) -> None:
                bars.show(Report(0, run, news))

            outcome = train(run, job.recipe, job.source, job.device, show, initial=job.initial)
            show(outcome)
            yield outcome


def _on_ray(job: Job, runs: list[Run], jobs: int, console: Console) -> Iterator[Outcome]:
    """On a Ray cluster: the one that RAY_ADDRESS names, else one of ``jobs`` processes on this machine."""
    try:
        import ray
    except ImportError as error:
        raise Refused('--engine ray needs ray; pip install "nusam[ray]".') from error
    if not ray.is_initialized():
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else jobs, log_to_driver=False)
    shared = ray.put(job)
    remote = ray.remote(num_cpus=1, num_gpus=int(job.device.type == "cuda"))(_alone)
    waiting = [remote.remote(run, shared) for run in runs]
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        outcome: Outcome | Refused = ray.get(ready)
        if isinstance(outcome, Refused):
            raise outcome
        console.print(
            f"{describe(outcome.run, job.recipe.base)}: {outcome.test_accuracy:.2%}, {len(waiting)} left",
            highlight=False,
        )
        yield outcome


def _alone(run: Run, job: Job) -> Outcome | Refused:
    """A refusal is returned: what a task raises, Ray prints with a traceback."""
    import torch

    from nusam.experiments.training.loop import train

    torch.set_num_threads(1)

    def silent(epoch: Epoch) -> None:
        pass

    try:
        return train(run, job.recipe, job.source, job.device, silent, initial=job.initial)
    except Refused as refusal:
        return refusal


ENGINES = {"local": _in_workers, "ray": _on_ray}
