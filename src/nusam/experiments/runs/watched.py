"""One run that is watched: bars, TensorBoard's events, a checkpoint to go on from, and what it came to."""

import math
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from nusam.experiments.files import alone_in, write_json, writing_to
from nusam.experiments.runs.progress import Bars
from nusam.experiments.training.checkpoint import Checkpoint
from nusam.experiments.training.data import Source
from nusam.experiments.training.devices import device_name
from nusam.experiments.training.loop import Stopped, train
from nusam.experiments.training.machine import Machine, launched
from nusam.experiments.training.scalars import Scalars
from nusam.experiments.training.spec import METRICS, Epoch, Outcome, Recipe, Report, Run

__all__ = ["Watched"]


@dataclass(frozen=True)
class Watched:
    """A run, alone or as a part of what torchrun or accelerate launched.

    Attributes:
        identity: what the run is, so that no other goes on from its checkpoint; ``machine`` says how it is computed.
        out: the folder of everything that is left.
        resume: whether to go on from the checkpoint there.
    """

    run: Run
    recipe: Recipe
    source: Source
    identity: dict[str, dict[str, Any]]
    out: Path
    resume: bool

    def train(self, device: str) -> int:
        """Train it; the exit code: 0 done, 1 done and diverged, 130 stopped and saved.

        Raises:
            Refused: if the run is not for such data, or the folder can't be read or written, or another process
                fills it.
        """
        how = self.identity["machine"]
        with launched(device) as mine, ExitStack() as stack:
            if not dist.is_initialized() or dist.get_rank() == 0:
                stack.enter_context(alone_in(self.out))
            return self._on(Machine(mine, how["precision"], how["compile"], how["parallel"]))

    def _on(self, machine: Machine) -> int:
        first = not dist.is_initialized() or dist.get_rank() == 0
        console = Console(markup=False, quiet=not first)
        console.print(self.source.told, highlight=False)
        checkpoint = Checkpoint(self.out / "checkpoint.pt", self.identity, self.resume)
        bars = Bars(console, 1, self.recipe.epochs, self.recipe.base)

        def show(news: Epoch | Outcome) -> None:
            bars.show(Report(0, self.run, news))

        scalars = None
        try:
            with writing_to(self.out):
                scalars = Scalars(self.out) if first else None
                with bars, checkpoint.stopping_on_signals():
                    outcome = train(
                        self.run, self.recipe, self.source, machine.device, show, machine, checkpoint, scalars
                    )
                    show(outcome)
                if first:
                    self._save(outcome, machine)
        except Stopped:
            console.print(f"Stopped, and saved as {checkpoint.path}; the same command with --resume goes on.")
            return 130
        finally:
            if scalars:
                scalars.close()
        judged = "" if self.source.metric == "accuracy" else f" (here: {METRICS[self.source.metric]})"
        console.print(
            f"Test accuracy {outcome.test_accuracy:.2%} after the last epoch, validation accuracy "
            f"{outcome.validation_accuracy:.2%}{judged}; {self.out / 'outcome.json'} has every epoch.",
            highlight=False,
        )
        diverged = next((n for n, epoch in enumerate(outcome.epochs, 1) if not math.isfinite(epoch.train_loss)), None)
        if diverged is None:
            return 0
        lower = "the learning rate or rho" if self.run.rho else "the learning rate"
        console.print(
            f"The run diverged: its loss is not finite from epoch {diverged} on; lower {lower}.", highlight=False
        )
        return 1

    def _save(self, outcome: Outcome, machine: Machine) -> None:
        where = {"device": device_name(machine.device), "processes": machine.processes}
        content = {
            **self.identity,
            "data": self._learned_from(),
            "machine": {**self.identity["machine"], **where},
            "sizes": self.source.sizes,
            "command": " ".join(["nusam", *sys.argv[1:]]),
            "test_accuracy": outcome.test_accuracy,
            "validation_accuracy": outcome.validation_accuracy,
            "seconds": round(outcome.seconds, 2),
            "epochs": [asdict(epoch) for epoch in outcome.epochs],
        }
        write_json(self.out / "outcome.json", content)

    def _learned_from(self) -> dict[str, Any]:
        """The data as asked for, but for a size that could not be met."""
        data = {**self.identity["data"], "title": self.source.title}
        if data["train_size"] is not None:
            data["train_size"] = self.source.train_size
        return data
