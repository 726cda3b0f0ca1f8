"""How long a step takes, measured apart from the training runs, which disturb each other."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from nusam.experiments.building import build
from nusam.experiments.machine import one_thread
from nusam.experiments.methods import METHODS
from nusam.experiments.runs import Run
from nusam.experiments.splits import Images

__all__ = ["step_seconds"]

ROUNDS = 10
STEPS = 10


def step_seconds(model_name: str, radii: Mapping[str, float], batch: Images, classes: int) -> dict[str, float]:
    """Median seconds of a step for each method, the methods taking turns so that all see the same machine."""
    steps = {method: _stepper(model_name, method, rho, batch, classes) for method, rho in radii.items()}
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    with one_thread():
        for _ in range(1 + ROUNDS):
            for method, step in steps.items():
                seconds[method].append(_seconds(step, batch.pixels.device))
    return {method: median(rounds[1:]) for method, rounds in seconds.items()}  # the first round warms up


def _stepper(model_name: str, method: str, rho: float, batch: Images, classes: int) -> Callable[[], object]:
    model = build(model_name, batch.pixels.shape[-1], batch.pixels.shape[1], classes).to(batch.pixels.device)
    optimizer = METHODS[method].wrap(AdamW(model.parameters()), Run(model_name, method, rho, seed=0), 0, model)
    return partial(optimizer.step, partial(_one_pass, model, optimizer, batch))


def _one_pass(model: nn.Module, optimizer: Optimizer, batch: Images) -> Tensor:
    """The closure that an optimizer's ``step`` takes: the loss, with its gradients computed."""
    optimizer.zero_grad()
    loss = cross_entropy(model(batch.pixels), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


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
