"""How long a step takes, measured apart from the training runs, which disturb each other."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from nusam import SharpnessAware
from nusam.experiments.training.building import build
from nusam.experiments.training.data import Source
from nusam.experiments.training.machine import one_thread
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.spec import Run
from nusam.experiments.training.splits import Images, split

__all__ = ["step_seconds"]

ROUNDS = 7
STEPS = 5


def step_seconds(runs: Mapping[str, Run], source: Source, batch_size: int, device: str) -> dict[str, float]:
    """Median seconds of a step of each run, by name; they take turns so that all see the same machine."""
    train = split(source, 0, device).train
    batch = Images(train.pixels[:batch_size], train.labels[:batch_size])
    steps = {name: _stepper(run, batch, source.classes) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with one_thread():
        for _ in range(1 + ROUNDS):
            for name, step in steps.items():
                seconds[name].append(_seconds(step, batch.pixels.device))
    return {name: median(rounds[1:]) for name, rounds in seconds.items()}  # the first round warms up


def _stepper(run: Run, batch: Images, classes: int) -> Callable[[], object]:
    pixels, labels = batch.pixels, batch.labels
    model = build(run.model, pixels.shape[-1], pixels.shape[1], classes).to(pixels.device)
    optimizer = METHODS[run.method].wrap(AdamW(model.parameters()), run, 0, model)

    def step() -> None:
        optimizer.zero_grad()
        for x, y in optimizer.passes(pixels, labels) if isinstance(optimizer, SharpnessAware) else [(pixels, labels)]:
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    _wait_for(device)
    return (time.perf_counter() - began) / STEPS


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
