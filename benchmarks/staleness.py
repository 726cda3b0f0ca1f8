"""How old ε may be, and whose: a loop by hand that finds it at older weights, or on other samples.

``python benchmarks/staleness.py [--jobs 2] [--seeds 8]``. One pass a step finds ε one update before it is used; here it
is also found two updates before, and on samples of the batch before at the weights of now. Settings are those in which
weights move far between two steps, and a plain one.
"""

import argparse
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from nusam.batch import first_samples
from nusam.experiments.runs.contest import interval, mean_and_error
from nusam.experiments.training.building import build
from nusam.experiments.training.data import load, with_wrong_labels
from nusam.experiments.training.loop import steps_of, warmed_cosine
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.scoring import score
from nusam.experiments.training.spec import Recipe
from nusam.experiments.training.splits import Images, split
from nusam.reference import svd_top1
from recording import record

SHARE = 1 / 8
TUNING = range(100, 102)  # seeds that are not reported
PLAIN = Recipe(40)


@dataclass(frozen=True)
class Setting:
    """A Mixer on digits; a share of the steps is taken by AdamW alone."""

    title: str
    recipe: Recipe = PLAIN
    train_size: int = 300
    delay: float = 0.1


RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
SETTINGS = (
    Setting("digits"),
    Setting("40% of the labels drawn anew", Recipe(40, wrong_labels=0.4), train_size=600),
    Setting("three times the learning rate", Recipe(40, learning_rate=12e-3)),
    Setting("no warm-up, perturbed from the start", Recipe(40, warm_up=0.0), delay=0.0),
    Setting("batches of 8, half the learning rate", Recipe(40, batch_size=8, learning_rate=2e-3)),
    Setting("the last fifth of the cosine alone", delay=0.8),
)


class Source(NamedTuple):
    """Where ε of a step is found: at weights so many updates old, on this batch's samples or on the last one's."""

    label: str
    updates_old: int = 0
    of_the_last_batch: bool = False


SOURCES = (
    Source("two passes: the weights of now"),
    Source("one pass: one update old", 1),
    Source("two updates old", 2),
    Source("the weights of now, samples of the batch before", 0, of_the_last_batch=True),
)


def accuracies(setting: Setting, source: Source | None, rho: float, seed: int) -> tuple[float, float]:
    """Of test and validation after the last epoch; without a source AdamW's."""
    torch.set_num_threads(1)
    recipe = setting.recipe
    digits = with_wrong_labels(load("digits", Path("data"), setting.train_size), recipe.wrong_labels)
    data = split(digits, seed, "cpu")
    torch.manual_seed(seed)
    model = build("mixer", digits.image_size, digits.channels, digits.classes)
    parameters = dict(model.named_parameters())
    optimizer = BASES[recipe.base].make(model, recipe.learning_rate, recipe.weight_decay)
    steps = steps_of(recipe, digits)
    schedule = warmed_cosine(optimizer, recipe, steps)
    us = {name: torch.randn(len(p)) for name, p in parameters.items() if p.ndim == 2}
    older: deque[dict[str, Tensor]] = deque(maxlen=1 + (source.updates_old if source else 0))
    last: Images | None = None
    for step, batch in enumerate(batches(data.train, recipe.batch_size, steps, seed)):
        epsilon: dict[str, Tensor] = {}
        if source and step >= setting.delay * steps:
            older.append({name: p.detach().clone() for name, p in parameters.items()})
            seen = last if source.of_the_last_batch and last is not None else batch
            gradients = gradients_at(model, older[0], {}, first_samples(seen, SHARE))
            for name in us:
                us[name], v = svd_top1(gradients[name], us[name])
                epsilon[name] = rho * torch.outer(us[name], v)
        for name, gradient in gradients_at(model, parameters, epsilon, batch).items():
            parameters[name].grad = gradient
        optimizer.step()
        schedule.step()
        last = batch
    return score(model, data.test), score(model, data.validation)


def batches(images: Images, size: int, steps: int, seed: int) -> Iterator[Images]:
    """Of every epoch in another order, the same for all that have the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(size):
            if steps == 0:
                return
            steps -= 1
            yield Images(images.pixels[chosen], images.labels[chosen])


def gradients_at(
    model: nn.Module, weights: dict[str, Tensor], epsilon: dict[str, Tensor], batch: Images
) -> dict[str, Tensor]:
    """Of the mean loss at weights + ε."""
    leaves = {name: (w.detach() + epsilon.get(name, 0)).requires_grad_() for name, w in weights.items()}
    loss = cross_entropy(functional_call(model, leaves, (batch.pixels,)), batch.labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--seeds", type=int, default=8)
    options = arguments.parse_args()
    table = []
    with ProcessPoolExecutor(options.jobs) as pool:

        def run(setting: Setting, source: Source | None, rho: float, seeds: range) -> list[tuple[float, float]]:
            return list(pool.map(partial(accuracies, setting, source, rho), seeds))

        for setting in SETTINGS:
            tried = {
                (source, rho): fmean(validation for _, validation in run(setting, source, rho, TUNING))
                for source in SOURCES
                for rho in RADII
            }
            base = [100 * test for test, _ in run(setting, None, 0.0, range(options.seeds))]
            rows = [("AdamW", 0.0, base)]
            for source in SOURCES:
                rho = max(RADII, key=lambda rho, source=source: (tried[source, rho], -rho))  # type: ignore[misc]
                rows.append((source.label, rho, [100 * t for t, _ in run(setting, source, rho, range(options.seeds))]))
            fresh = rows[1][2]
            for label, rho, tests in rows:
                end = " (an end)" if rho in (RADII[0], RADII[-1]) else ""
                table.append(
                    {
                        "setting": setting.title,
                        "ε": label,
                        "ρ": f"{rho:g}{end}" if rho else "–",
                        "test accuracy": mean_and_error(tests),
                        "over AdamW": interval([a - b for a, b in zip(tests, base, strict=True)]) if rho else "–",
                        "over two passes": (
                            interval([a - b for a, b in zip(tests, fresh, strict=True)])
                            if rho and tests is not fresh
                            else "–"
                        ),
                    }
                )
    plainly = (
        f"{PLAIN.epochs} epochs of {SETTINGS[0].train_size} images, batches of {PLAIN.batch_size}, learning rate "
        f"{PLAIN.learning_rate:g}, decay {PLAIN.weight_decay:g}, warm-up {PLAIN.warm_up:.0%} and a cosine, perturbed "
        f"after {SETTINGS[0].delay:.0%} of the steps"
    )
    record(
        "staleness",
        "cpu",
        table,
        f"νSAM by hand, ε from an eighth of the batch by one warm-started power iteration. {options.seeds} seeds, each "
        "with its own split, order and initial weights, the same for all rows; test accuracy in % after the last "
        "epoch, ± standard error; differences paired by seed, with their 95% intervals. ρ of each row by validation "
        f"accuracy on {len(TUNING)} other seeds, among {', '.join(f'{rho:g}' for rho in RADII)}. AdamW; "
        f"unless the setting says otherwise, {plainly}.",
    )


if __name__ == "__main__":
    main()
