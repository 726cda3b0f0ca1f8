"""``nusam demo``: what SAM is for, in minutes on two processor cores."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from nusam.experiments.errors import Refused
from nusam.experiments.files import writing_to
from nusam.experiments.limits import at_least, part_of
from nusam.experiments.pages.table import show
from nusam.experiments.recipes import demo
from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.runs.store import Store
from nusam.experiments.training.data import load
from nusam.experiments.training.devices import require_device
from nusam.experiments.training.models import SMALL, require_fit
from nusam.experiments.training.own import OWN
from nusam.experiments.training.spec import Recipe
from nusam.experiments.training.text import SENTENCES

__all__ = ["Demo"]

SIZES = {"digits": 400}  # training images; a few hundred of the others
EPOCHS = {"digits": 40, "digits-28": 40}  # 20 of the others


@dataclass(frozen=True)
class Demo:
    """Train a Mixer and a ViT on images of which some labels are wrong: AdamW, AdamW stopped in time, SAM and νSAM.

    Ends with a table and a figure: accuracy, gain, and the price of a step. Ctrl-C keeps every finished run; the same
    command goes on.
    """

    data: str = "digits"
    """digits; or fashion-mnist, cifar10 or folder, your own images, where their files are in --data-root."""
    data_root: Path = Path("data")
    """Folder with FashionMNIST/raw, cifar-10-batches-py, or train/CLASS/*.png and test/CLASS/*.png."""
    wrong_labels: float | None = None
    """Share of the labels for training and validation that are drawn anew; 0.4 unless given, 0 of a folder."""
    train_size: int | None = None
    """Training images; 400 of digits and others unless given."""
    seeds: int = 4
    """How many. A seed decides the data split, the initial weights and the order, alike for all methods."""
    epochs: int | None = None
    """Passes over the training images; 40 for digits and 20 for the others unless given."""
    jobs: int | None = None
    """Runs side by side; the number of cores on a processor and 1 elsewhere unless given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    out: Path = Path("runs/demo")
    """Folder of finished runs (runs.jsonl), and of the table and the figure."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        if self.data in SENTENCES:
            raise Refused(f"--data must be of images here, got {self.data}; nusam train and sweep take sentences.")
        for option, value in (("seeds", self.seeds), ("epochs", self.epochs), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise Refused(f"--{option} must be at least 1, got {value}.")
        at_least(0, train_size=self.train_size)
        wrong = (0.0 if self.data in OWN else 0.4) if self.wrong_labels is None else self.wrong_labels
        part_of(wrong_labels=wrong)
        require_device(self.device)
        size = SIZES.get(self.data) if self.train_size is None else self.train_size
        source = load(self.data, self.data_root, size)
        for model in SMALL:
            require_fit(model, source.image_size, source.channels)
        store = Store(self.out)
        console = Console(markup=False)
        recipe = Recipe(self.epochs or EPOCHS.get(self.data, 20), wrong_labels=wrong)
        bench = Bench(store, "", self.data, self.data_root, self.jobs, self.device, console)
        try:
            with store.locked():
                result = demo.Demo(self.data, recipe, self.seeds, size).run(bench, source)
        except KeyboardInterrupt:
            console.print(f"Stopped; {len(store)} finished runs are in {self.out}, and the same command goes on.")
            return 130
        result = replace(result, circumstances={**bench.circumstances(), **result.circumstances})
        show(result, console)
        from nusam.experiments.pages.demo_figure import learning_and_price

        picture = self.out / "demo.png"
        with writing_to(self.out):
            table = result.write(self.out)
            learning_and_price(result, picture)
        console.print(f"Saved as {table} and {picture}.", highlight=False)
        return 0
