"""Independent runs side by side in worker processes: one model this small leaves most of a machine idle."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from nusam.experiments.errors import Refused
from nusam.experiments.training.data import Source
from nusam.experiments.training.loop import train
from nusam.experiments.training.spec import Outcome, Recipe, Report, Run

__all__ = ["Workers"]


class Workers:
    """So many processes, each training one run at a time; leaving the context ends them at once."""

    def __init__(
        self,
        count: int,
        recipe: Recipe,
        source: Source,
        device: torch.device,
        initial: dict[str, Tensor] | None = None,
    ) -> None:
        self._count = count
        self._job = (recipe, source, device, initial)
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> "Workers":
        spawn = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            # A pipe for each worker, so that either side notices the other's death.
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(theirs, *self._job), daemon=True)
            self._connections.append(ours)
            self._processes.append(process)
            _start_deaf_to_interrupts(process)
            theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def train(self, pending: deque[Run]) -> Iterator[Report]:
        """Train all runs of ``pending``, to which the caller may add more at every report.

        Raises:
            Refused: if a worker refused its run.
            RuntimeError: if a worker died.
        """
        idle = list(range(self._count))
        busy: dict[int, Run] = {}
        while pending or busy:
            while pending and idle:
                worker = idle.pop(0)
                busy[worker] = pending.popleft()
                self._connections[worker].send(busy[worker])
            for connection in wait([self._connections[worker] for worker in busy]):
                worker = self._connections.index(connection)  # type: ignore[arg-type]
                run = busy[worker]
                try:
                    news = self._connections[worker].recv()
                except EOFError:
                    raise RuntimeError(f"The worker that trained {run} died; it says why above.") from None
                if isinstance(news, Refused):
                    raise news
                if isinstance(news, Outcome):
                    del busy[worker]
                    idle.append(worker)
                yield Report(worker, run, news)


def _start_deaf_to_interrupts(process: BaseProcess) -> None:
    """Ctrl-C reaches every process of a terminal; the parent alone answers it. A new process inherits the deafness."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(
    parent: Connection, recipe: Recipe, source: Source, device: torch.device, initial: dict[str, Tensor] | None
) -> None:
    torch.set_num_threads(1)
    try:
        while True:
            parent.send(train(parent.recv(), recipe, source, device, parent.send, initial=initial))
    except Refused as refusal:
        parent.send(refusal)
    except (EOFError, BrokenPipeError):  # the parent is gone
        pass
