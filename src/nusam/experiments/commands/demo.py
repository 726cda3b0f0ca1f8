"""``nusam demo``: AdamW, SAM, SAM-ON and νSAM on an MLP-Mixer and a ViT small enough for two processor cores."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nusam.experiments.errors import Refused
from nusam.experiments.limits import some_of
from nusam.experiments.recipes.comparison import Comparison
from nusam.experiments.runs.rho_selection import Contest, Plan
from nusam.experiments.training.data import load
from nusam.experiments.training.devices import require_device
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import SMALL, require_fit
from nusam.experiments.training.spec import Recipe

__all__ = ["Demo"]

EPOCHS = {"digits": 40, "digits-28": 40}  # 30 of the others
TRIAL_SEEDS = 2


@dataclass(frozen=True)
class Demo:
    """Train an MLP-Mixer and a ViT with AdamW, SAM, SAM-ON and νSAM; compare accuracy, step time and memory.

    Leaves results.json and a figure of the learning curves. ρ is chosen by validation accuracy. Ctrl-C keeps what
    was finished.
    """

    data: str = "digits"
    """digits, or fashion-mnist or cifar10 where their files are in --data-root; small subsets of them."""
    data_root: Path = Path("data")
    """Folder with FashionMNIST/raw, cifar-10-batches-py, or train/CLASS/*.jpg and test/CLASS/*.jpg."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD")] = ("adamw", "sam", "sam-on", "nusam")
    """Which to compare, separated by spaces or commas."""
    rho: float | None = None
    """One radius for every method and model, instead of choosing it."""
    ascent_share: float = 1.0
    """Of each batch, that the ascents see."""
    seeds: int = 4
    """How many. A seed decides the data split, the initial weights and the order, alike for all methods."""
    epochs: int | None = None
    """Passes over the training images; 40 for digits and 30 for the others unless given."""
    jobs: int | None = None
    """Runs side by side; the number of cores, at most 8, on a processor and 1 elsewhere unless given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    out: Path = Path("runs/demo")
    """Folder for results.json and demo.png."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        methods = _methods(self.methods)
        for option, value in (("--seeds", self.seeds), ("--epochs", self.epochs), ("--jobs", self.jobs)):
            if value is not None and value < 1:
                raise Refused(f"{option} must be at least 1, got {value}.")
        if self.rho is not None and not (math.isfinite(self.rho) and self.rho > 0):
            raise Refused(f"--rho must be a positive number, got {self.rho}; leave it out to have it chosen.")
        some_of(ascent_share=self.ascent_share)
        require_device(self.device)
        source = load(self.data, self.data_root)
        for model in SMALL:
            require_fit(model, source.image_size, source.channels)
        recipe = Recipe(self.epochs or EPOCHS.get(self.data, 30))
        plan = Plan(_radii(methods, self.rho), self.seeds, TRIAL_SEEDS, self.ascent_share)
        options = {**asdict(self), "methods": methods}
        return Comparison(source, recipe, self.device, plan, self.out, options).run(self.jobs)


def _methods(given: Sequence[str]) -> list[str]:
    names = [name for part in given for name in part.split(",") if name]
    for name in names or ["nothing"]:
        if name not in METHODS:
            raise Refused(f"--methods must name some of {', '.join(METHODS)}, got {name}.")
    return list(dict.fromkeys(names))


def _radii(methods: Sequence[str], rho: float | None) -> dict[Contest, tuple[float, ...]]:
    """The candidates: nothing to choose for AdamW, nor where a radius is given."""
    radii: dict[Contest, tuple[float, ...]] = {}
    for model in SMALL:
        for method in methods:
            candidates = METHODS[method].radii.get(model, (0.0,))
            radii[Contest(model, method)] = candidates if rho is None or method == "adamw" else (rho,)
    return radii
