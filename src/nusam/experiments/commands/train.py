"""``nusam train``: one run, watched, and taken up again where it was stopped."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from nusam.experiments.errors import Refused
from nusam.experiments.files import writing_to
from nusam.experiments.limits import at_least, pixels_on_a_side
from nusam.experiments.training.augmentation import AUGMENTATIONS, require_images
from nusam.experiments.training.data import Source, load, with_wrong_labels
from nusam.experiments.training.devices import PARALLEL, PRECISIONS, require_device
from nusam.experiments.training.methods import ALONE, BASES, METHOD_NAMES, METHODS, kept_as, require_one_base
from nusam.experiments.training.models import TITLES, require_fit
from nusam.experiments.training.own import OWN, content_of
from nusam.experiments.training.spec import Recipe, Run

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train one model, alone or under torchrun or accelerate launch.

    Leaves outcome.json, TensorBoard's events and a checkpoint in --out. Ctrl-C and SIGTERM save the state and stop;
    the same command with --resume goes on, bit for bit.
    """

    model: str = "mixer"
    """mixer or vit (small), mixer-128, vit-128 (the study's), vit-s/4, vit-b/4, mixer-s/4, mixer-b/4; pretrained
    vit-s/16, vit-b/16, mixer-b/16. Small and not as in the paper: mixer-conv, vit-mean. For sentences: bert-base,
    minilm, bert-tiny (untrained)."""
    method: str = "nusam"
    """none (the base optimizer alone), sam, sam-on, nusam, nusam-norm or gauss."""
    rho: float = 0.05
    """The radius."""
    delay: float | None = None
    """Share of the steps before the perturbation starts; the method's own unless given."""
    power_iterations: int = 1
    """Of νSAM."""
    ascent_share: float = 1.0
    """Of each batch, that the ascent sees."""
    one_pass: bool = False
    """Let the next step's ascent ride in each step's descent (νSAM)."""
    seed: int = 0
    """Decides the data split, the initial weights and the order."""
    data: str = "digits"
    """digits, digits-28 (enlarged), or fashion-mnist, cifar10, cifar10-desk (as in the study), cifar100 or folder where
    their files are in --data-root; sentences are movie-reviews and tsv (files in --data-root), glue-cola, -sst2, -mrpc,
    -qqp, -stsb, -mnli, -qnli, -rte, and sentences (a few made up)."""
    data_root: Path = Path("data")
    """Folder of the data's files; of folder, with train/CLASS/*.png and test/CLASS/*.png."""
    image_size: int = 0
    """Of folder: resize the images to so many pixels on a side, and cut out the middle; 0 takes them as they are."""
    download: bool = False
    """Fetch what is missing."""
    train_size: int | None = None
    """Training images; a few hundred unless given, and with 0 all but those for validation."""
    wrong_labels: float = 0.0
    """Share of the labels for training and validation that are drawn anew, to see what that does to a method."""
    base: str = "adamw"
    """Base optimizer: sgd, adam, adamw or adafactor."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 32
    """Of all processes together."""
    learning_rate: float = 4e-3
    """At its highest: linear warm-up, then cosine."""
    weight_decay: float = 0.05
    """Of the base optimizer."""
    warm_up: float = 0.1
    """Share of the steps."""
    augment: str = "none"
    """none, crop, crop-flip or crop-flip-autoaugment."""
    accumulate: int = 1
    """Micro-batches of a step, each perturbed on its own."""
    precision: str = "fp32"
    """fp32, or bf16 or fp16 for autocast."""
    compile: bool = False
    """Compile the model."""
    parallel: str = "ddp"
    """How several processes share the run: ddp or fsdp2."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    out: Annotated[Path, tyro.conf.arg(name="out")] = Path("runs/train")
    """Folder of everything that is left."""
    resume: bool = False
    """Go on from the checkpoint in --out, if there is one; the options must be the same."""

    def __call__(self) -> int:
        """Run it; the exit code: 0 done, 1 done and diverged, 130 stopped and saved."""
        self._check()
        run, recipe = self._wanted()
        require_device(self.device)
        source = load(self.data, self.data_root, self.train_size, self.download, self.image_size)
        source = with_wrong_labels(source, self.wrong_labels)
        require_images(self.augment, self.data, source.channels)
        require_fit(self.model, source.image_size, source.channels)
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        from nusam.experiments.runs.watched import Watched

        identity = self._identity(run, recipe, source)
        return Watched(run, recipe, source, identity, self.out, self.resume).train(self.device)

    def _wanted(self) -> tuple[Run, Recipe]:
        """What to train, and how. The base optimizer alone has no other options."""
        method, share = kept_as(self.method), self.ascent_share
        run = Run(self.model, method, self.rho, self.seed, self.delay, self.power_iterations, ascent_share=share)
        run = replace(run, one_pass=self.one_pass)
        if run.method == ALONE:
            run = replace(run, rho=0.0, delay=None, power_iterations=1, ascent_share=1.0, one_pass=False)
        return run, Recipe(
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.weight_decay,
            self.warm_up,
            self.base,
            self.augment,
            self.accumulate,
            self.wrong_labels,
        )

    def _identity(self, run: Run, recipe: Recipe, source: Source) -> dict[str, dict[str, object]]:
        """What a checkpoint must be of to be gone on from."""
        own: dict[str, object] = {"image_size": self.image_size or "as it is"} if self.data == "folder" else {}
        if self.data in OWN:  # their title is the folder's name, which may change
            own["files"] = content_of(self.data, source)
        else:
            own["title"] = source.title
        return {
            "run": asdict(run),
            "recipe": asdict(recipe),
            "data": {"data": self.data, "train_size": self.train_size, **own},
            "machine": {"precision": self.precision, "compile": self.compile, "parallel": self.parallel},
        }

    def _check(self) -> None:
        choices: dict[str, Collection[str]] = {
            "model": TITLES,
            "method": METHOD_NAMES,
            "base": BASES,
            "augment": AUGMENTATIONS,
            "precision": PRECISIONS,
            "parallel": PARALLEL,
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise Refused(f"--{option} must be one of {', '.join(allowed)}, got {getattr(self, option)}.")
        require_one_base("method", self.method, self.base)
        if self.one_pass and not (METHODS[kept_as(self.method)].low_rank and self.accumulate == 1):
            raise Refused(
                f"--one-pass is for nusam and nusam-norm without --accumulate, got {self.method} and "
                f"{self.accumulate} micro-batches; leave it out."
            )
        at_least(0, train_size=self.train_size)
        pixels_on_a_side(image_size=self.image_size)
