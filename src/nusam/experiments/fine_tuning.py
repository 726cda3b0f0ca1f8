"""Fine-tuning: what is pretrained on, and where the pretrained weights come from."""

from dataclasses import dataclass, replace

from nusam.experiments.contest import Setting
from nusam.experiments.data import load
from nusam.experiments.experiment import Bench
from nusam.experiments.store import Cell
from nusam.experiments.training import Epoch, Recipe, Run, train

__all__ = ["fine_tuning_data", "fine_tuning_settings"]


@dataclass(frozen=True)
class FineTuning:
    """A scale's pretraining, if it is not downloaded, and the recipe that follows."""

    data: tuple[str, ...]
    models: tuple[str, ...]
    recipe: Recipe
    train_size: int | None
    pretraining: Cell | None = None  # its model is replaced


# The paper: 10 epochs, learning rate 1e-4 with cosine, no weight decay, no augmentation. The rate of the small models
# is ours, ten times as large.
_SMALL = Recipe(10, learning_rate=1e-3, weight_decay=0.0, warm_up=0.0)
_SCALES = {
    "smoke": FineTuning(
        ("digits-28",),
        ("mixer",),
        replace(_SMALL, epochs=2),
        64,
        Cell("digits-28", Recipe(1), Run("", "adamw", 0.0, seed=1000), 64),
    ),
    "cpu": FineTuning(
        ("digits-28",),
        ("mixer", "vit"),
        _SMALL,
        300,
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
            bench.scale.trial_seeds,
            tuning.train_size,
            pretrained=_pretrained(bench, tuning, model),
        )
        for model in tuning.models
    ]


def _pretrained(bench: Bench, tuning: FineTuning, model: str) -> str:
    """The key under which the store has the weights."""
    if tuning.pretraining is None:
        return ""
    cell = replace(tuning.pretraining, run=replace(tuning.pretraining.run, model=model))
    path = bench.store.weights(cell.key)
    if not path.exists():
        bench.console.print(f"Pretraining {model} on {cell.data} …")
        source = load(cell.data, bench.data_root, cell.train_size)

        def tell(epoch: Epoch) -> None:
            bench.console.print(f"  loss {epoch.train_loss:.3f}, test accuracy {epoch.test_accuracy:.1%}")

        train(cell.run, cell.recipe, source, bench.device, tell, keep=path)
    return cell.key
