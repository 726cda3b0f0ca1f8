"""What the tables and figures of the paper have in common: scales, settings, and a bench to run cells on."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from rich.console import Console

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.runs.contest import LEAST, Contest, Setting
from nusam.experiments.runs.filling import fill
from nusam.experiments.runs.search import Search, carried_out
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.augmentation import AUGMENTATIONS
from nusam.experiments.training.data import load
from nusam.experiments.training.devices import device_name
from nusam.experiments.training.models import SMALL, TITLES
from nusam.experiments.training.spec import Recipe

__all__ = ["SCALES", "SMALL_MODELS", "Bench", "Experiment", "Scale"]

SMALL_MODELS = "models (width 64, depth 2, 4 × 4 patches)"  # in words


@dataclass(frozen=True)
class Scale:
    """How large an experiment is: data, models, seeds and the recipe of every run.

    Attributes:
        ours: what this project chose instead of the paper's, beside the values of the recipe.
        tunes_rate: whether the learning rate is searched for, as ρ is, by AdamW's validation accuracy.
        on_request: data that are run only where they are named.
        notes: on its recipe, for results that were made by it.
    """

    data: tuple[str, ...]
    models: tuple[str, ...]
    recipes: dict[str, Recipe]  # by data
    seeds: dict[str, int]
    train_size: dict[str, int | None]
    tunes_rate: bool = False
    one_radius: bool = False  # the first candidate instead of a choice
    ours: str = ""
    on_request: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


SCALES = {
    "smoke": Scale(
        data=("digits",),
        models=("mixer",),
        recipes={"digits": Recipe(epochs=2)},
        seeds={"digits": 2},
        train_size={"digits": 64},
        one_radius=True,
        ours="data and models, for a run of seconds that tests the pipeline and nothing else",
    ),
    "cpu": Scale(
        data=("digits",),
        models=SMALL,
        recipes={
            "digits": Recipe(epochs=40, scored_every=2),
            "fashion-mnist": Recipe(epochs=20, scored_every=2),
            "cifar10": Recipe(epochs=20, scored_every=2),
        },
        tunes_rate=True,
        seeds={"digits": 8, "fashion-mnist": 3, "cifar10": 3},
        train_size={"digits": 300, "fashion-mnist": 500, "cifar10": 2000},
        on_request=("fashion-mnist", "cifar10"),
        ours=f"data and {SMALL_MODELS}",
        notes=("Data, sizes and epochs were selected by looking: several were tried, and test accuracies were seen.",),
    ),
    "desk": Scale(
        data=("cifar10-desk",),
        models=("mixer-128", "vit-128"),
        recipes={
            "cifar10-desk": Recipe(epochs=50, batch_size=64, learning_rate=1e-3, augment="crop-flip", scored_every=10)
        },
        seeds={"cifar10-desk": 10},
        train_size={"cifar10-desk": None},
        ours="data, models and recipe, chosen for what two processor cores can do in a day",
    ),
    "full": Scale(
        data=("cifar10", "cifar100"),  # the recipes name theirs
        models=("mixer-b/4", "mixer-s/4", "vit-b/4", "vit-s/4"),
        recipes={
            name: Recipe(
                epochs=300, batch_size=256, learning_rate=1e-3, warm_up=1 / 30, augment="crop-flip-autoaugment"
            )
            for name in ("cifar10", "cifar100")
        },
        seeds={"cifar10": 3, "cifar100": 3},
        train_size={"cifar10": 0, "cifar100": 0},
        ours="the recipe after Gani et al. (2022), on which the paper builds",
        notes=(
            "Gani et al. train for 100 epochs where we do for the 300 of the paper's Figure 3, with label smoothing of "
            "0.1, CutMix, MixUp, repeated augmentation, stochastic depth and random erasing, which are left out here "
            "(all but label smoothing by the paper's words), and ViTs of other shapes, pretrained by self-supervision.",
        ),
    ),
}


@dataclass
class Bench:
    """Where an experiment runs: a store of finished runs, and how to fill it.

    Attributes:
        jobs: runs side by side; None for as many as the device takes.
        device: its name.
    """

    store: Store
    scale_name: str
    data: str
    data_root: Path
    jobs: int | None
    device: str
    console: Console
    download: bool = False
    began: float = field(default_factory=time.perf_counter)
    made: set[Cell] = field(default_factory=set)  # runs made here
    found: set[Cell] = field(default_factory=set)  # runs that the store had
    told: set[str] = field(default_factory=set)  # what has been said of the data
    rates: dict[str, float] = field(default_factory=dict)  # learning rates that were searched for, by model

    @property
    def scale(self) -> Scale:
        """Of the experiment."""
        return SCALES[self.scale_name]

    def fill(self, cells: Iterable[Cell]) -> None:
        """Run what the store lacks."""
        cells = list(cells)
        self.found.update(cell for cell in cells if cell in self.store and cell not in self.made)
        self.made.update(cell for cell in cells if cell not in self.found)
        where = self.data_root, self.jobs, self.device, self.console
        fill(self.store, cells, *where, download=self.download, told=self.told)

    def hold(self, contests: list[Contest]) -> None:
        """Choose every ρ, and run every seed."""
        carried_out([search for contest in contests for search in contest.searches()], self.store, self.fill)
        self.fill(cell for contest in contests for cell in contest.finals(self.store))

    def settings(self, experiment: "Experiment", **changes: Any) -> list[Setting]:
        """One for each model of an experiment, with changes to the recipe."""
        scale = self.scale
        recipe = replace(scale.recipes[self.data], **changes)
        settings = [
            Setting(self.data, model, recipe, scale.seeds[self.data], scale.train_size[self.data])
            for model in experiment.models(self.scale_name)
        ]
        if not scale.tunes_rate:
            return settings
        rate = recipe.learning_rate
        searches = [Search(rate, setting.of_rate, LEAST * rate) for setting in settings]
        carried_out(searches, self.store, self.fill)
        self.rates = {setting.model: search.found for setting, search in zip(settings, searches, strict=True)}
        return [setting.at_rate(self.rates[setting.model]) for setting in settings]

    def result(
        self,
        experiment: "Experiment",
        title: str,
        columns: list[str],
        rows: list[dict[str, Any]],
        curves: list[Curve] | None = None,
        findings: str = "",
        setting: Setting | None = None,
        radii: str = "",
        notes: Iterable[str] = (),
    ) -> Result:
        """What the experiment came to, with where and how.

        Args:
            experiment: whose name and notes it carries.
            title: a sentence.
            columns: of the table, in order.
            rows: of the table.
            curves: of the figure.
            findings: what agrees with the paper and what doesn't.
            setting: of the first model, if there were runs.
            radii: what of ρ is ours, and how it was chosen.
            notes: those that depend on the bench, beside the experiment's.
        """
        published = experiment.published
        if setting and self.rates:  # each model's own
            published = {**published, "learning_rate": setting.recipe.learning_rate}
            found = ", ".join(f"{rate:g} for {TITLES[model]}" for model, rate in self.rates.items())
            notes = [f"Learning rate, by AdamW's validation accuracy in the same way as ρ: {found}.", *notes]
        values = _values_that_are_ours(setting, published) if setting else ""
        ours = "; ".join(filter(None, (experiment.ours(self.scale_name), values, radii)))
        of_recipe = self.scale.notes if setting and experiment.ours(self.scale_name) == self.scale.ours else ()
        notes = [f"Ours: {ours}.", *of_recipe, *notes, *experiment.notes]
        if self.data == "cifar10":  # the original or a copy, as the files say
            notes.append(f"Data: {load(self.data, self.data_root, self.scale.train_size[self.data]).title}.")
        return Result(
            name=experiment.name,
            title=title,
            scale=self.scale_name,
            data=self.data,
            columns=columns,
            rows=rows,
            curves=curves or [],
            findings=findings,
            notes=notes,
            circumstances=_circumstances(setting) if setting else {},
        )

    def choice_of_radius(self, experiment: "Experiment", contest: Contest) -> str:
        """What of it is ours."""
        setting = contest.setting
        if self.scale.one_radius:
            return "ρ, the first candidate"
        given = [setting.candidates(contender) for contender in contest.contenders.values()]
        if all(len(candidates) == 1 for candidates in given):
            return ""
        reported = set(setting.tuning) <= set(range(setting.seeds))
        of = f"of the {setting.seeds} seeds" if reported else "seeds that are not reported"
        choice = f"the choice of ρ by validation accuracy over {len(setting.tuning)} {of}"
        if all(given):
            return choice if "rho" in experiment.published else f"the candidates for ρ and {choice}"
        return f"{choice}, by factors of 2 until the best one has worse neighbours"

    def circumstances(self) -> dict[str, Any]:
        """Where, when and with what."""
        import torch

        runs = f"{len(self.made)} made here, {len(self.found)} found finished"
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "date": date.today().isoformat(),
            "python": python_version(),
            **{name: version(name) for name in ("nusam", "torch", "timm")},
            "command": " ".join(["nusam", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - self.began, 1),
            **({"runs": runs} if self.made | self.found else {}),
        }


def _circumstances(setting: Setting) -> dict[str, Any]:
    return {
        "recipe": asdict(setting.recipe),
        "seeds": setting.seeds,
        "tuning_seeds": list(setting.tuning),
        "train_size": setting.train_size,  # 0 is all
    }


def _values_that_are_ours(setting: Setting, published: Mapping[str, Any]) -> str:
    """In words, those that the paper's text does not give, or gives otherwise."""
    recipe, size = setting.recipe, setting.train_size
    values = {**asdict(recipe), "seeds": setting.seeds, "train_size": size}
    words = {
        "train_size": f"{size:,} training examples" if size else "all training examples but those for validation",
        "seeds": f"{setting.seeds} seeds",
        "epochs": f"{recipe.epochs} {'epoch' if recipe.epochs == 1 else 'epochs'}",
        "batch_size": f"batch size {recipe.batch_size}",
        "learning_rate": f"learning rate {recipe.learning_rate:g}",
        "weight_decay": f"weight decay {recipe.weight_decay:g}",
        "warm_up": f"warm-up over {100 * recipe.warm_up:.2g}% of the steps" if recipe.warm_up else "no warm-up",
        "augment": AUGMENTATIONS[recipe.augment],
        **({} if recipe.beta2 is None else {"beta2": f"β₂ = {recipe.beta2:g}"}),
    }
    return ", ".join(word for name, word in words.items() if name not in published or published[name] != values[name])


class Experiment(ABC):
    """A table or figure of the paper.

    Attributes:
        published: values of the recipe, of seeds and of ρ that the paper's text gives; all others are ours.
        models_of_paper, data_of_paper: what it is run on at the full scale.
    """

    name: str
    title: str
    needs: str  # beyond what is embedded
    takes: dict[str, str]  # by scale, about how long
    notes: tuple[str, ...] = ()
    published: Mapping[str, Any] = {"augment": "crop-flip-autoaugment"}
    models_of_paper: tuple[str, ...] = SCALES["full"].models
    data_of_paper: tuple[str, ...] = SCALES["full"].data

    def data(self, scale: str) -> tuple[str, ...]:
        """What it is run on at a scale; of an experiment without data, one empty name."""
        return self.data_of_paper if scale == "full" else SCALES[scale].data

    def models(self, scale: str) -> tuple[str, ...]:
        """What is trained at a scale."""
        return self.models_of_paper if scale == "full" else SCALES[scale].models

    def ours(self, scale: str) -> str:
        """What this project chose, beside the values of the recipe."""
        return SCALES[scale].ours

    def on_request(self, scale: str) -> tuple[str, ...]:
        """What it is run on if --data names it."""
        return SCALES[scale].on_request if self.data(scale) == SCALES[scale].data else ()

    @abstractmethod
    def run(self, bench: Bench) -> Result:
        """Run what is missing and draw the conclusions."""
