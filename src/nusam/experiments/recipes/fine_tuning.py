"""Fine-tuning: what is pretrained on, and where the pretrained weights come from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nusam.experiments.recipes.experiment import SCALES, SMALL_MODELS, Bench
from nusam.experiments.runs.contest import Setting
from nusam.experiments.runs.store import Cell
from nusam.experiments.training.data import load
from nusam.experiments.training.spec import Epoch, Recipe, Run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ONE_SET", "PUBLISHED", "fine_tuning_data", "fine_tuning_ours", "fine_tuning_settings"]


@dataclass(frozen=True)
class FineTuning:
    """A scale's pretraining, if it is not downloaded, and the recipe that follows."""

    data: tuple[str, ...]
    models: tuple[str, ...]
    recipe: Recipe
    train_size: int | None
    ours: str = ""
    pretraining: Cell | None = None  # its model is replaced


ONE_SET = (
    "Of one set of pretrained weights for each model: the seeds are of fine-tuning alone, so that nothing here says "
    "how much another pretraining would change."
)
# Of §5.2.1, with its 3 runs, and of Table 11. Of that our text has values without names: 1e-4 can only be the learning
# rate, which Table 13 halves, but what the zeros and "Disabled" are of, it does not say.
PUBLISHED = {"epochs": 10, "learning_rate": 1e-4, "weight_decay": 0.0, "seeds": 3}
# Its learning rate is ten times the paper's.
_SMALL = Recipe(10, learning_rate=1e-3, weight_decay=0.0, warm_up=0.0)
_SCALES = {
    "smoke": FineTuning(
        ("digits-28",),
        ("mixer",),
        replace(_SMALL, epochs=2),
        64,
        SCALES["smoke"].ours,
        Cell("digits-28", Recipe(1), Run("", "adamw", 0.0, seed=1000), 64),
    ),
    "cpu": FineTuning(
        ("digits-28",),
        SCALES["cpu"].models,
        _SMALL,
        300,
        f"data (digits, enlarged to 28 × 28) and {SMALL_MODELS}, pretrained here with AdamW on 4,000 images of "
        "Fashion-MNIST for 20 epochs",
        Cell("fashion-mnist", Recipe(20), Run("", "adamw", 0.0, seed=1000), 4000),
    ),
    "full": FineTuning(
        ("cifar10", "cifar100"),
        ("mixer-b/16", "vit-b/16", "vit-s/16"),
        Recipe(10, batch_size=128, learning_rate=1e-4, weight_decay=0.0, warm_up=0.0),
        0,
    ),
}


def fine_tuning_data(scale: str) -> tuple[str, ...]:
    """What can be fine-tuned on."""
    return _SCALES[scale].data


def fine_tuning_ours(scale: str) -> str:
    """What this project chose, beside the values of the recipe."""
    return _SCALES[scale].ours


def fine_tuning_settings(bench: Bench) -> list[Setting]:
    """One for each model, which is pretrained first if it has not been."""
    tuning = _SCALES[bench.scale_name]
    seeds = 3 if bench.scale_name == "full" else bench.scale.seeds["digits"]
    return [
        Setting(
            bench.data,
            model,
            tuning.recipe,
            seeds,
            tuning.train_size,
            pretrained=_pretrained(bench, tuning, model),
        )
        for model in tuning.models
    ]


def _pretrained(bench: Bench, tuning: FineTuning, model: str) -> str:
    """The name under which the store has the weights, trained first if they are not there."""
    if tuning.pretraining is None:
        return ""
    cell = replace(tuning.pretraining, run=replace(tuning.pretraining.run, model=model))
    path = bench.store.weights(cell.key)
    if not path.exists():
        bench.console.print(f"Pretraining {model} on {cell.data} …")
        _pretrain(bench, cell, path)
    return f"{cell.key}-{_content(bench.store.pretrained(cell.key))}"


def _pretrain(bench: Bench, cell: Cell, path: Path) -> None:
    source = load(cell.data, bench.data_root, cell.train_size, bench.download)

    def tell(epoch: Epoch) -> None:
        bench.console.print(f"  {epoch}")

    import torch

    from nusam.experiments.training.loop import train
    from nusam.experiments.training.machine import one_thread

    with one_thread():
        train(cell.run, cell.recipe, source, torch.device(bench.device), tell, keep=path)


def _content(weights: "Mapping[str, Tensor]") -> str:
    """The same for the same weights, so that runs from weights that were lost and trained anew are told apart."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
