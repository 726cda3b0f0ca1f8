"""Whether one radius suits models of all sizes: ρ for every matrix, ρ√(n/m), and ρ from the rise of the loss.

``python benchmarks/radii.py [--jobs 2] [--model mixer] [--labels clean wrong]``. It goes on where it was stopped. Every
rule gets the value that is best on validation for each width and depth, by factors of √2; a rule carries over whose
best values lie close together, or whose one value costs little at every size.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nusam.batch import first_samples
from nusam.experiments.runs.contest import interval, mean_and_error
from nusam.experiments.training.building import PatchEmbedding
from nusam.experiments.training.data import load, with_wrong_labels
from nusam.experiments.training.loop import steps_of, warmed_cosine
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.scoring import score
from nusam.experiments.training.spec import Recipe
from nusam.experiments.training.splits import split
from nusam.reference import svd_top1
from recording import RESULTS, record
from staleness import batches, gradients_at

SHARE = 1 / 8
DELAY = 0.1
SEEDS = range(100, 104)
LARGEST = 0.8  # ρ at most, where the loss hardly rises any more


class Size(NamedTuple):
    """Of a model."""

    width: int
    depth: int


SIZES = (Size(32, 2), Size(64, 2), Size(128, 2), Size(256, 2), Size(64, 4), Size(64, 8))
LABELS = {
    "clean": (Recipe(40), 300),
    "wrong": (Recipe(20, wrong_labels=0.4), 600),
}
Pairs = dict[str, tuple[Tensor, Tensor, Tensor]]  # u, σ and v of each matrix's gradient


def fixed(value: float, pairs: Pairs) -> dict[str, float]:
    """νSAM as it is: ρ for every matrix."""
    return dict.fromkeys(pairs, value)


def spectral(value: float, pairs: Pairs) -> dict[str, float]:
    """ρ√(n/m) for a matrix of n × m, which moves its output by as much whatever its shape (Yang et al. 2023)."""
    return {name: value * (len(u) / len(v)) ** 0.5 for name, (u, _, v) in pairs.items()}


def loss_rise(value: float, pairs: Pairs) -> dict[str, float]:
    """ρ with which the loss rises by a given amount in first order, ρΣσᵢ, and never more than LARGEST."""
    return dict.fromkeys(pairs, min(LARGEST, value / max(float(sum(s for _, s, _ in pairs.values())), 1e-12)))


RULES: dict[str, tuple[Callable[[float, Pairs], dict[str, float]], float]] = {  # and where its search starts
    "ρ": (fixed, 0.1),
    "ρ√(n/m)": (spectral, 0.1),
    "rise of the loss": (loss_rise, 0.1),
}


@dataclass(frozen=True)
class Trial:
    """A training that is told by its validation accuracy. Without a rule it is AdamW's."""

    model: str
    size: Size
    labels: str
    rate: float
    seed: int
    rule: str = ""
    value: float = 0.0

    @property
    def key(self) -> str:
        """By which it is kept."""
        width, depth = self.size
        return f"{self.model} {width}x{depth} {self.labels} {self.rate:g} {self.rule} {self.value:.4g} {self.seed}"


def built(model: str, size: Size) -> nn.Module:
    """A Mixer or ViT of the paper's kind for digits."""
    common: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    if model == "vit":
        return VisionTransformer(embed_dim=size.width, depth=size.depth, num_heads=4, **common)
    mixer = MlpMixer(embed_dim=size.width, num_blocks=size.depth, **common)
    mixer.stem = PatchEmbedding(mixer.get_submodule("stem.proj"))  # type: ignore[arg-type]
    return mixer


def accuracies(trial: Trial) -> tuple[float, float]:
    """Of validation and test after the last epoch."""
    torch.set_num_threads(1)
    recipe, images = LABELS[trial.labels]
    digits = with_wrong_labels(load("digits", Path("data"), images), recipe.wrong_labels)
    data = split(digits, trial.seed, "cpu")
    torch.manual_seed(trial.seed)
    model = built(trial.model, trial.size)
    parameters = dict(model.named_parameters())
    optimizer = BASES[recipe.base].make(model, trial.rate, recipe.weight_decay)
    steps = steps_of(recipe, digits)
    schedule = warmed_cosine(optimizer, recipe, steps)
    us = {name: torch.randn(len(p)) for name, p in parameters.items() if p.ndim == 2}
    for step, batch in enumerate(batches(data.train, recipe.batch_size, steps, trial.seed)):
        epsilon: dict[str, Tensor] = {}
        if trial.rule and step >= DELAY * steps:
            gradients = gradients_at(model, parameters, {}, first_samples(batch, SHARE))
            pairs: Pairs = {}
            for name in us:
                us[name], v = svd_top1(gradients[name], us[name])
                pairs[name] = us[name], us[name] @ gradients[name] @ v, v
            radii = RULES[trial.rule][0](trial.value, pairs)
            epsilon = {name: radii[name] * torch.outer(u, v) for name, (u, _, v) in pairs.items()}
        for name, gradient in gradients_at(model, parameters, epsilon, batch).items():
            parameters[name].grad = gradient
        optimizer.step()
        schedule.step()
    return score(model, data.validation), score(model, data.test)


class Kept:
    """What trials came to, in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.found: dict[str, tuple[float, float]] = {key: (v, t) for key, v, t in map(json.loads, lines)}

    def add(self, trial: Trial, came_to: tuple[float, float]) -> None:
        """Write one down."""
        self.found[trial.key] = came_to
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([trial.key, *came_to]) + "\n")

    def validation(self, trials: Iterable[Trial]) -> float:
        """The mean over trials."""
        return fmean(self.found[trial.key][0] for trial in trials)

    def test(self, trials: Iterable[Trial]) -> list[float]:
        """Of each trial, in %."""
        return [100 * self.found[trial.key][1] for trial in trials]


@dataclass
class Climb:
    """To the value with the best validation accuracy, by factors of 2 and then, if finely, of √2."""

    best: float
    trials: Callable[[float], list[Trial]]
    finely: bool
    factor: float = 2.0

    def wanted(self, kept: Kept) -> list[Trial]:
        """What the next move needs, after all moves that are possible; nothing at the end."""
        while True:
            values = [self.best, self.best / self.factor, self.best * self.factor]
            missing = [trial for value in values for trial in self.trials(value) if trial.key not in kept.found]
            if missing:
                return missing
            best = max(values, key=lambda value: (kept.validation(self.trials(value)), -value))
            if best == self.best:
                if not self.finely or self.factor < 2:
                    return []
                self.factor = 2**0.5
            self.best = best

    def tried(self, kept: Kept) -> dict[float, float]:
        """Mean validation accuracy, in %, of every value that was looked at."""
        steps = (self.best * 2 ** (half / 2) for half in range(-16, 17))
        known = [value for value in steps if all(trial.key in kept.found for trial in self.trials(value))]
        return {value: 100 * kept.validation(self.trials(value)) for value in known}


def carried_out(climbs: list[Climb], kept: Kept, jobs: int) -> None:
    """Carry all of them to their ends, side by side."""
    with ProcessPoolExecutor(jobs) as pool:
        while wanted := [trial for climb in climbs for trial in climb.wanted(kept)]:
            for trial, came_to in zip(wanted, pool.map(accuracies, wanted), strict=True):
                kept.add(trial, came_to)


def rows(model: str, labels: str, kept: Kept, jobs: int) -> list[dict[str, Any]]:
    """A line for each rule and size."""

    def trials(size: Size, rate: float, rule: str = "") -> Callable[[float], list[Trial]]:
        return lambda value: [Trial(model, size, labels, rate, seed, rule, value) for seed in SEEDS]

    def alone(size: Size) -> Callable[[float], list[Trial]]:
        return lambda rate: trials(size, rate)(0.0)

    rates = {size: Climb(4e-3, alone(size), finely=False) for size in SIZES}
    carried_out(list(rates.values()), kept, jobs)
    start = 4 if labels == "wrong" else 1  # times what is best for clean labels
    climbs = {
        (rule, size): Climb(start * least, trials(size, rates[size].best, rule), finely=True)
        for rule, (_, least) in RULES.items()
        for size in SIZES
    }
    carried_out(list(climbs.values()), kept, jobs)
    lines = []
    for (rule, size), climb in climbs.items():
        base, best = (kept.test(group) for group in (rates[size].trials(rates[size].best), climb.trials(climb.best)))
        tried = climb.tried(kept)
        as_good = [value for value, accuracy in tried.items() if accuracy > tried[climb.best] - 0.5]
        lines.append(
            {
                "model": f"{model}, {labels} labels",
                "rule": rule,
                "width": size.width,
                "depth": size.depth,
                "AdamW's rate": f"{rates[size].best:g}",
                "best value": f"{climb.best:.3g}",
                "within half a point": f"{min(as_good):.3g} to {max(as_good):.3g}",
                "AdamW": mean_and_error(base),
                "over AdamW": interval([a - b for a, b in zip(best, base, strict=True)]),
            }
        )
    return lines


def spread(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest best value over the smallest, over widths, over depths, and over all sizes."""
    found = []
    for name in dict.fromkeys((line["model"], line["rule"]) for line in lines):
        own = [line for line in lines if (line["model"], line["rule"]) == name]
        groups = {
            "over widths": [line for line in own if line["depth"] == 2],
            "over depths": [line for line in own if line["width"] == 64],
            "over all": own,
        }
        ratios = {
            title: max(values) / min(values)
            for title, group in groups.items()
            if (values := [float(line["best value"]) for line in group])
        }
        found.append({"model": name[0], "rule": name[1], **{title: f"{ratio:.2g}" for title, ratio in ratios.items()}})
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--models", nargs="+", choices=("mixer", "vit"), default=["mixer", "vit"])
    arguments.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    options = arguments.parse_args()
    kept = Kept(RESULTS / "radii" / "runs.jsonl")
    lines = [
        line
        for labels in options.labels
        for model in options.models
        for line in rows(model, labels, kept, options.jobs)
    ]
    notes = (
        "νSAM by hand on digits, ε from an eighth of the batch by one warm-started power iteration, perturbed after "
        f"{DELAY:.0%} of the steps. {len(SEEDS)} seeds. AdamW's rate (by factors of 2) and each rule's value (by "
        "factors of 2, then its neighbours by √2) are those with the best mean validation accuracy, bracketed; test "
        "accuracy in % at the best value, of the same seeds. Within half a point: the values that were tried whose "
        "validation accuracy is at most half a point below. "
        f"Clean labels: {LABELS['clean'][1]} images, {LABELS['clean'][0].epochs} epochs. Wrong labels, 40% drawn anew: "
        f"{LABELS['wrong'][1]} images, {LABELS['wrong'][0].epochs} epochs. Rise of the loss: never more than ρ = "
        f"{LARGEST:g}."
    )
    record("radii", "cpu", lines, notes)
    record("radii-spread", "cpu", spread(lines), "The largest best value over the smallest, of `radii-cpu.md`.")


if __name__ == "__main__":
    main()
