"""One training run: AdamW with warm-up and cosine decay, alone or inside a sharpness-aware method."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from nusam import SharpnessAware
from nusam.experiments.data import Images, Source, split
from nusam.experiments.methods import METHODS
from nusam.experiments.models import build

__all__ = ["Epoch", "Outcome", "Recipe", "Run", "accuracy", "one_pass", "steps_of", "train"]

EVALUATION_BATCH = 128  # stays in a processor's cache


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common."""

    epochs: int
    batch_size: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1  # share of the steps


@dataclass(frozen=True)
class Run:
    """What tells one run from another. AdamW alone has ρ = 0."""

    model: str
    method: str
    rho: float
    seed: int


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch."""

    train_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    run: Run
    epochs: list[Epoch]
    validation_accuracy: float
    delay_steps: int
    perturbation_numel: int
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """That of the last epoch; no epoch is picked."""
        return self.epochs[-1].test_accuracy


def train(run: Run, recipe: Recipe, source: Source, device: torch.device, report: Callable[[Epoch], None]) -> Outcome:
    """Train one model. The seed decides the split, the initial weights and the order: the same for every method."""
    began = time.perf_counter()
    data = split(source, run.seed, device)
    torch.manual_seed(run.seed)
    model = build(run.model, source.image_size, source.channels, source.classes).to(device)
    steps = steps_of(recipe, source)
    base = AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    optimizer = METHODS[run.method].wrap(base, run.rho, steps, model)
    schedule = _schedule(optimizer, recipe, steps)
    order = torch.Generator().manual_seed(run.seed)
    epochs = []
    for _ in range(recipe.epochs):
        loss = _train_epoch(model, optimizer, schedule, data.train, recipe.batch_size, order)
        epochs.append(Epoch(loss, accuracy(model, data.test)))
        report(epochs[-1])
    return Outcome(
        run,
        epochs,
        validation_accuracy=accuracy(model, data.validation),
        delay_steps=METHODS[run.method].delay_steps(steps),
        perturbation_numel=optimizer.perturbation_numel() if isinstance(optimizer, SharpnessAware) else 0,
        seconds=time.perf_counter() - began,
    )


def steps_of(recipe: Recipe, source: Source) -> int:
    """Optimizer steps of a whole run."""
    return recipe.epochs * math.ceil(source.train_size / recipe.batch_size)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images that the model classifies correctly."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    with torch.no_grad():
        for start in range(0, len(images), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            correct += (model(images.pixels[part]).argmax(1) == images.labels[part]).sum()
    return int(correct) / len(images)


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    images: Images,
    batch_size: int,
    order: torch.Generator,
) -> float:
    """Mean loss of the epoch, each batch's at the weights before its step."""
    model.train()
    total = torch.zeros((), device=images.labels.device)
    shuffled = torch.randperm(len(images), generator=order).to(images.labels.device)
    for start in range(0, len(images), batch_size):
        batch = shuffled[start : start + batch_size]
        closure: Any = partial(one_pass, model, optimizer, images.pixels[batch], images.labels[batch])
        loss: Any = optimizer.step(closure)  # AdamW alone runs the closure once, the others twice
        total += loss.detach() * len(batch)
        schedule.step()
    return float(total) / len(images)


def one_pass(model: nn.Module, optimizer: Optimizer, pixels: Tensor, labels: Tensor) -> Tensor:
    """The closure that an optimizer's ``step`` takes: the loss, with its gradients computed."""
    optimizer.zero_grad()
    loss = cross_entropy(model(pixels), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    warm_up = max(1, int(recipe.warm_up * steps))
    rise = LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm_up))
    return SequentialLR(optimizer, [rise, fall], milestones=[warm_up])
