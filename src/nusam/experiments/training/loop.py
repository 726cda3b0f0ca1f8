"""One training run, from the weights' initialization to the last accuracy: read it top to bottom.

A base optimizer with warm-up and cosine decay, alone or inside a sharpness-aware method; on one process or several.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from nusam import SharpnessAware
from nusam.experiments.errors import Refused
from nusam.experiments.files import save_whole
from nusam.experiments.training.augmentation import augmented
from nusam.experiments.training.building import build
from nusam.experiments.training.checkpoint import Checkpoint, State
from nusam.experiments.training.data import Source
from nusam.experiments.training.machine import Machine
from nusam.experiments.training.methods import BASES, METHODS
from nusam.experiments.training.scalars import Scalars
from nusam.experiments.training.scoring import loss as loss_of
from nusam.experiments.training.scoring import score
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Run
from nusam.experiments.training.splits import split

__all__ = ["Stopped", "steps_of", "train", "warmed_cosine"]

Batches = Iterator[tuple[Tensor, Tensor]]  # of all processes together: pixels and labels


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


@dataclass
class Progress:
    """What a checkpoint knows beside weights and optimizer."""

    step: int = 0
    loss: float = 0.0  # summed over the epoch's images so far
    epochs: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0


def train(
    run: Run,
    recipe: Recipe,
    source: Source,
    device: torch.device,
    report: Callable[[Epoch], None],
    machine: Machine | None = None,
    checkpoint: Checkpoint | None = None,
    scalars: Scalars | None = None,
    initial: dict[str, Tensor] | None = None,
    keep: Path | None = None,
) -> Outcome:
    """Train one model. The seed decides the split, the initial weights and the order: the same for every method.

    Args:
        run: model, method, ρ and seed.
        recipe: what all runs of a comparison share.
        source: the images.
        device: where model and images live.
        report: told of every epoch as it ends, and first of those that the checkpoint had.
        machine: precision, compilation and parallelism; a single process in float32 unless given.
        checkpoint: where the state is kept, and taken up from.
        scalars: gets what happens in every step.
        initial: weights to start from, as far as their shapes fit (a new head keeps its own).
        keep: where to save the last weights.

    Raises:
        Stopped: if the checkpoint was asked to stop; its state is saved then.
        Refused: if the model is not for such data, or a checkpoint or weights can't be read or written.
    """
    machine = machine or Machine(device)
    data = split(source, run.seed, device)
    torch.manual_seed(run.seed)
    model = build(run.model, source.image_size, source.channels, source.classes).to(device)
    _load_what_fits(model, initial or {})
    model = machine.wrapped(model)
    steps, per_epoch = steps_of(recipe, source, run.stretch), _steps_per_epoch(recipe, source)
    base = BASES[recipe.base].make(model, recipe.learning_rate * run.rate, recipe.weight_decay, recipe.beta2)
    optimizer = METHODS[run.method].wrap(base, run, steps, model)
    schedule = warmed_cosine(optimizer, recipe, steps)
    order = torch.Generator().manual_seed(run.seed)
    noise = torch.Generator().manual_seed(run.seed)
    saved_noise = torch.Generator().manual_seed(run.seed) if run.one_pass else noise  # as before what rides along
    progress = Progress()
    state = State(model, optimizer, schedule, machine.scaler, saved_noise, progress)
    if checkpoint:
        checkpoint.load(state)
        noise.set_state(saved_noise.get_state())
    for epoch in progress.epochs:
        report(epoch)
    for _ in range(progress.step // per_epoch):  # what finished epochs drew
        torch.randperm(len(data.train), generator=order)

    def batches(first: int) -> Batches:
        shuffled = torch.randperm(len(data.train), generator=order)
        for step in range(first, steps):
            if step > first and step % per_epoch == 0:
                shuffled = torch.randperm(len(data.train), generator=order)
            saved_noise.set_state(noise.get_state())
            start = step % per_epoch * recipe.batch_size
            chosen = shuffled[start : start + recipe.batch_size].to(device)
            yield augmented(data.train.pixels[chosen], recipe.augment, noise), data.train.labels[chosen]

    began = time.perf_counter() - progress.seconds
    model.train()
    gradients = _in_one_pass if run.one_pass else _step_by_step
    pending = batches(progress.step)
    for step, losses in enumerate(gradients(model, optimizer, machine, pending, recipe.accumulate), progress.step):
        machine.scaler.step(optimizer)
        machine.scaler.update()
        schedule.step()

        progress.step = step + 1
        left = len(data.train) - step % per_epoch * recipe.batch_size
        progress.loss += float(next(iter(losses.values()))) * min(recipe.batch_size, left)
        if scalars:
            scalars.step(step, optimizer, losses)
        if progress.step % per_epoch == 0:
            scored = progress.step == steps or progress.step // per_epoch % recipe.scored_every == 0
            test = score(model, data.test, source.metric) if scored else None
            validation = score(model, data.validation, source.metric) if scored and recipe.validates_epochs else None
            progress.epochs.append(Epoch(progress.loss / len(data.train), test, validation))
            progress.loss = 0.0
            report(progress.epochs[-1])
            model.train()
        if checkpoint and checkpoint.is_due(progress.step % per_epoch == 0):
            progress.seconds = time.perf_counter() - began
            checkpoint.save(state)
            if checkpoint.stop_asked:
                raise Stopped

    if keep:
        _keep(model, keep)
    return Outcome(
        run,
        progress.epochs,
        validation_accuracy=score(model, data.validation, source.metric),
        delay_steps=METHODS[run.method].delay_steps(run, steps),
        perturbation_numel=optimizer.perturbation_numel() if isinstance(optimizer, SharpnessAware) else 0,
        seconds=time.perf_counter() - began,
    )


def _step_by_step(
    model: nn.Module, optimizer: Optimizer, machine: Machine, batches: Batches, accumulate: int
) -> Iterator[dict[str, Tensor]]:
    """The gradients of joint batches; the loss in each pass over all of one, the first at the weights as they are."""
    for pixels, labels in batches:
        optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        for x, y in zip(pixels.chunk(accumulate), labels.chunk(accumulate), strict=True):
            x, y = machine.share(x), machine.share(y)
            for number, (xs, ys) in enumerate(_passes(optimizer, x, y, accumulate > 1)):
                loss = _loss(model, machine, xs, ys, len(labels))
                machine.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                if len(ys) == len(y):  # the loss of a share is that of other samples
                    name = "perturbed" if number else "unperturbed"
                    losses[name] = losses.get(name, torch.zeros_like(loss)) + loss.detach()
        yield _averaged(losses, machine)


def _in_one_pass(
    model: nn.Module, optimizer: Optimizer, machine: Machine, batches: Batches, accumulate: int
) -> Iterator[dict[str, Tensor]]:
    """The same with the next step's ascent in this step's descent."""

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return _loss(model, machine, machine.share(x), machine.share(y), len(y))

    def backward(loss: Tensor) -> None:
        machine.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    assert isinstance(optimizer, SharpnessAware)
    for value in optimizer.one_pass(batches, loss, backward=backward):
        yield _averaged({"perturbed": value}, machine)


def _loss(model: nn.Module, machine: Machine, x: Tensor, y: Tensor, count: int) -> Tensor:
    """Summed here and averaged over processes, this is the mean over the joint batch whatever the shares."""
    with machine.autocast():
        return loss_of(model(x).float(), y, reduction="sum") * (machine.processes / count)


def _averaged(losses: dict[str, Tensor], machine: Machine) -> dict[str, Tensor]:
    if machine.processes > 1:
        for loss in losses.values():
            dist.all_reduce(loss.div_(machine.processes))
    return losses


def _passes(optimizer: Optimizer, x: Tensor, y: Tensor, accumulate: bool) -> Iterator[tuple[Tensor, Tensor]]:
    return optimizer.passes(x, y, accumulate=accumulate) if isinstance(optimizer, SharpnessAware) else iter([(x, y)])


def steps_of(recipe: Recipe, source: Source, stretch: float = 1.0) -> int:
    """Optimizer steps of a whole run."""
    return max(1, round(recipe.epochs * stretch)) * _steps_per_epoch(recipe, source)


def _steps_per_epoch(recipe: Recipe, source: Source) -> int:
    return math.ceil(source.train_size / recipe.batch_size)


def _keep(model: nn.Module, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_whole(path, model.state_dict())
    except OSError as error:
        raise Refused(
            f"The weights {path} could not be written ({error.strerror}); make room there, or name another folder."
        ) from error


def _load_what_fits(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({**own, **{name: w for name, w in weights.items() if w.shape == own[name].shape}})


def warmed_cosine(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rate rises over the warm-up, and falls as a cosine."""
    warm_up = max(1, int(recipe.warm_up * steps))
    rise = LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm_up))
    return SequentialLR(optimizer, [rise, fall], milestones=[warm_up])
