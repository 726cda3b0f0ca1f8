"""Two processes with shares of unequal size train with dropout, are stopped, and go on; and find no room.

python -m tests.distributed.launching 2 tests.experiments.resuming FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nusam.experiments.errors import Refused
from nusam.experiments.training.checkpoint import Checkpoint
from nusam.experiments.training.data import load
from nusam.experiments.training.loop import Stopped, train
from nusam.experiments.training.machine import Machine, launched
from nusam.experiments.training.spec import Epoch, Recipe, Run

RUN, RECIPE = Run("bert-tiny", "nusam", 0.01, 0), Recipe(4)


def main() -> None:
    folder = Path(sys.argv[1])
    with launched("cpu") as device:
        for parallel in ("ddp", "fsdp2"):
            check(folder, device, parallel)
        print("bit-equal")
        (folder / "file").touch()
        checkpoint = Checkpoint(folder / "file" / "checkpoint.pt", {}, resume=False)
        try:
            train(RUN, RECIPE, load("sentences", folder, 63), device, lambda epoch: None, checkpoint=checkpoint)
        except Refused:
            print("refused")


def check(folder: Path, device: torch.device, parallel: str) -> None:
    source = load("sentences", folder, 63)

    def run(checkpoint: Checkpoint | None = None, stop_after: int = 0) -> list[Epoch]:
        reported: list[Epoch] = []

        def report(epoch: Epoch) -> None:
            reported.append(epoch)
            if checkpoint and len(reported) == stop_after:
                checkpoint.stop_asked = True

        train(RUN, RECIPE, source, device, report, Machine(device, parallel=parallel), checkpoint)
        return reported

    path, identity = folder / f"{parallel}.pt", {"run": {"seed": 0}}
    undisturbed = run()
    try:
        run(Checkpoint(path, identity, resume=False), stop_after=2)
    except Stopped:
        torch.manual_seed(99 + dist.get_rank())  # as in other processes
        assert run(Checkpoint(path, identity, resume=True)) == undisturbed
    else:
        raise AssertionError("it was not stopped")
