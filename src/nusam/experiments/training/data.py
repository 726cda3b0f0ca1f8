"""What the experiments learn from: small subsets of known data sets, and data of one's own."""

import errno
import gzip
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from nusam.experiments.errors import Refused
from nusam.experiments.training import image_folders, text
from nusam.experiments.training.class_sizes import require_two_of_each, with_every_class

__all__ = ["DATASETS", "Labels", "Pixels", "Source", "Tokens", "load", "shuffled", "with_wrong_labels"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# How much is used unless told otherwise.
TRAIN = 400
VALIDATION = 1_000
TEST = 1_000

_FETCHED = ("fashion-mnist", "cifar10", "cifar10-desk", "cifar100")
_UNREACHABLE = (URLError, ConnectionError, TimeoutError, HTTPException)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_TORCHVISION_ADVICE = " You can use download=True to download it"

Pixels = NDArray[np.uint8]
Tokens = NDArray[np.int64]
Labels = NDArray[Any]  # int64 classes, or float32 scores


@dataclass(frozen=True)
class Source:
    """A data set before training and validation are told apart; plain arrays travel between processes."""

    title: str
    classes: int
    train_size: int
    pool: Pixels | Tokens  # (N, C, S, S), or (N, L)
    pool_labels: Labels
    test: Pixels | Tokens
    test_labels: Labels
    metric: str = "accuracy"
    always_split: bool = False  # whether every seed has the same images for training
    notes: tuple[str, ...] = ()  # sentences on what was not done as one may think

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour, 0 for sentences."""
        return int(self.pool.shape[1]) if self.pool.ndim == 4 else 0

    @property
    def image_size(self) -> int:
        """Pixels on a side, or tokens of the longest sentence."""
        return int(self.pool.shape[-1])

    @property
    def sizes(self) -> dict[str, int]:
        """Images or sentences in each split."""
        validation = len(self.pool_labels) - self.train_size
        return {"train": self.train_size, "validation": validation, "test": len(self.test_labels)}

    @property
    def told(self) -> str:
        """What is learned from, in sentences."""
        kind = "images" if self.channels else "sentences"
        train, validation, test = (f"{size:,}" for size in self.sizes.values())
        sizes = f"{self.title}: {train} {kind} to train with, {validation} for validation, {test} for the test."
        return "\n".join((sizes, *self.notes))


def load(
    name: str,
    root: Path,
    train_size: int | None = None,
    download: bool | None = None,
    image_size: int | None = None,
) -> Source:
    """Read a data set.

    Args:
        name: one of :data:`DATASETS`.
        root: the folder of its files; digits need none.
        train_size: training images; a few hundred unless given, and with 0 all but those for validation.
        download: fetch what is missing, where the data set has a home; None of a command without that option.
        image_size: pixels on a side, to which images of one's own are resized and cut; 0 leaves them as they are, and
            so does None, of a command without that option.

    Raises:
        Refused: if the name is unknown, or its files are not there, can't be fetched or can't be read.
    """
    if name not in DATASETS:
        raise Refused(f"--data must be one of {', '.join(DATASETS)}, got {name}.")
    if image_size and name != "folder":
        raise Refused(f"--image-size is for images of your own (--data folder), got {name}; leave it out.")
    try:
        sized = {"image_size": image_size} if name == "folder" else {}
        source = DATASETS[name](root, train_size, download, **sized)
    except _UNREACHABLE as error:
        raise Refused(
            f"--data {name} could not be downloaded ({error}); connect to the network, or put its files into "
            f"--data-root, which is {root}."
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        if download and isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise Refused(
                f"--data-root {root} can't be written to ({error.strerror}); make room there, or name another folder."
            ) from error
        reason = str(error).removesuffix(_TORCHVISION_ADVICE).removesuffix(".")
        raise Refused(
            f"--data {name} was found but could not be read: {reason}; put complete files there"
            f"{_or_fetch(name, download)}."
        ) from error
    if train_size and source.train_size < train_size:
        note = (
            f"--train-size {train_size} can't be met, as some are kept for validation; {source.train_size} are taken."
        )
        source = replace(source, notes=(*source.notes, note))
    return source


def _or_fetch(name: str, download: bool | None) -> str:
    """The end of a sentence that says what is missing."""
    return ", or let --download fetch them" if download is False and name in _FETCHED else ""


def _digits(root: Path, train_size: int | None, download: bool | None) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    order = shuffled(len(labels), seed=0)
    pool, test = order[:1000], order[1000:]
    size = 300 if train_size is None else _at_most(train_size, len(pool), validation=100)
    return Source("digits", 10, size, pixels[pool], labels[pool], pixels[test], labels[test])


def _digits_28(root: Path, train_size: int | None, download: bool | None) -> Source:
    """The digits, enlarged to the size of Fashion-MNIST's images."""
    import torch
    from torch.nn.functional import interpolate

    small = _digits(root, train_size, download)

    def enlarged(pixels: Pixels | Tokens) -> Pixels:
        large = interpolate(torch.from_numpy(pixels).float(), size=28, mode="bilinear", antialias=True)
        return large.round().clamp(0, 255).to(torch.uint8).numpy()

    return replace(small, title="digits, enlarged", pool=enlarged(small.pool), test=enlarged(small.test))


def _fashion_mnist(root: Path, train_size: int | None, download: bool | None) -> Source:
    if (root / "FashionMNIST" / "raw").is_dir() or (download and not DEBIAN_FASHION_MNIST.is_dir()):
        parts = _of_torchvision("FashionMNIST", root, download)
        train, test = ((part.data.numpy(), part.targets.numpy()) for part in parts)
    elif DEBIAN_FASHION_MNIST.is_dir():
        train, test = (_idx_files(DEBIAN_FASHION_MNIST, part) for part in ("train", "t10k"))
    else:
        raise Refused(
            f"--data fashion-mnist needs the folder FashionMNIST/raw in --data-root, which is {root}, or the Debian "
            "package dataset-fashion-mnist, and found neither; provide one of them"
            f"{_or_fetch('fashion-mnist', download)}."
        )
    return _subset("Fashion-MNIST", train_size, *((pixels[:, None], labels) for pixels, labels in (train, test)))


def _idx_files(folder: Path, part: str) -> tuple[Pixels, Labels]:
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def _cifar10(
    root: Path,
    train_size: int | None,
    download: bool | None,
    name: str = "cifar10",
    held_out: tuple[int, int | None] | None = None,
) -> Source:
    if (root / "cifar-10-batches-py").is_dir() or (download and not (root / "train").is_dir()):
        parts = _cifar("CIFAR10", root, download)
        return _subset("CIFAR-10", train_size, *parts, held_out=held_out)
    title = "CIFAR-10 (JPEG re-encoded)"
    return _folders(name, root, title, train_size, download, held_out=held_out)


def _cifar10_desk(root: Path, train_size: int | None, download: bool | None) -> Source:
    """8,000 images for training and 5,000 for validation, the same for every seed, and the whole test part."""
    size = 8_000 if train_size is None else train_size
    source = _cifar10(root, size, download, "cifar10-desk", held_out=(5_000, None))
    return replace(source, always_split=True)


def _cifar100(root: Path, train_size: int | None, download: bool | None) -> Source:
    if not (root / "cifar-100-python").is_dir() and not download:
        raise Refused(
            f"--data cifar100 needs the files of the folder cifar-100-python in --data-root, which is {root}; point "
            f"--data-root to them{_or_fetch('cifar100', download)}."
        )
    return _subset("CIFAR-100", train_size, *_cifar("CIFAR100", root, download))


def _cifar(name: str, root: Path, download: bool | None) -> list[tuple[Pixels, Labels]]:
    parts = _of_torchvision(name, root, download)
    return [(part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in parts]


def _of_torchvision(name: str, root: Path, download: bool | None) -> list[Any]:
    """The training and the test part; what torchvision prints of failed attempts is left to our sentence."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    with redirect_stdout(StringIO()):
        try:
            return [kind(root, train, download=bool(download)) for train in (True, False)]
        except RuntimeError as error:
            if "Error downloading" in str(error):  # from the last of several places
                raise ConnectionError(str(error).splitlines()[0].rstrip(":")) from error
            raise


def _folder(root: Path, train_size: int | None, download: bool | None, image_size: int | None = None) -> Source:
    return _folders("folder", root, root.resolve().name, train_size, image_size=image_size)


def _folders(
    name: str,
    root: Path,
    title: str,
    train_size: int | None,
    download: bool | None = None,
    image_size: int | None = None,
    held_out: tuple[int, int | None] | None = None,
) -> Source:
    validation, tests = held_out or (VALIDATION, TEST)
    image_folders.require_train_and_test(name, root, _or_fetch(name, download))
    train, test = (image_folders.found(name, root / part) for part in ("train", "test"))
    for here, there in ((train, test), (test, train)):
        if missing := [label for label in here.classes if label not in there.classes]:
            raise Refused(
                f"--data {name} needs the same classes in {root}/train and {root}/test, and {there.path} has no "
                f"{missing[0]}; complete them."
            )
    require_two_of_each(name, [train.classes[target] for target in train.targets])
    every = train_size == 0
    targets = np.array(train.targets, np.int64)
    most = len(targets) if every else (train_size or TRAIN) + validation
    drawn = with_every_class(shuffled(len(targets), seed=0), targets, min(most, len(targets)), least=2)[:most]
    tested = shuffled(len(test.targets), seed=0)[: None if every else tests]
    files = [train.files[index] for index in drawn] + [test.files[index] for index in tested]
    pixels = image_folders.pixels(name, root, files, image_size)
    parts = (
        (pixels[: len(drawn)], targets[drawn]),
        (pixels[len(drawn) :], np.array(test.targets, np.int64)[tested]),
    )
    source = _subset(title, train_size, *parts, classes=len(train.classes), held_out=held_out)
    return replace(source, notes=image_folders.passed_over(train.others + test.others))


def _sentences(name: str, title: str, root: Path, train_size: int | None, download: bool | None) -> Source:
    if name in ("tsv", *text.GLUE):
        return replace(
            _subset(title, train_size, *(text.tsv(root) if name == "tsv" else text.glue(name))),
            metric=text.metric_of(name),
        )
    tokens, labels = text.movie_reviews(root) if name == "movie-reviews" else text.tiny_sentences()
    order = shuffled(len(labels), seed=0)
    held_out = min(TEST // 2, len(labels) // 5)
    if not held_out:
        raise ValueError(f"{len(labels)} rated sentences are too few")
    parts = [(tokens[chosen], labels[chosen]) for chosen in (order[held_out:], order[:held_out])]
    return _subset(title, train_size, *parts)


def _subset(
    title: str,
    train_size: int | None,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    classes: int = 0,
    held_out: tuple[int, int | None] | None = None,
) -> Source:
    """Part of a data set; ``held_out``: most images for validation, and for the test, None being all."""
    validation, tests = held_out or (VALIDATION, TEST)
    every = len(train[1])
    size = _at_most(TRAIN if train_size is None else train_size, every, min(validation, every // 2))
    scores = np.issubdtype(train[1].dtype, np.floating)
    labels = train[1].astype(np.float32 if scores else np.int64)
    pooled = min(size + validation, every)
    pool = with_every_class(shuffled(every, seed=0), labels, pooled, least=2)[:pooled]
    tested = shuffled(len(test[1]), seed=0)[: None if train_size == 0 else tests]
    return Source(
        title,
        classes=classes or (1 if scores else int(labels.max()) + 1),
        train_size=size,
        pool=train[0][pool],
        pool_labels=labels[pool],
        test=test[0][tested],
        test_labels=test[1][tested].astype(labels.dtype),
    )


def _at_most(wanted: int, every: int, validation: int) -> int:
    """So many training images that enough are left for validation."""
    return min(wanted or every, every - validation)


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """The numbers below ``count`` in the seed's order."""
    return np.random.default_rng(seed).permutation(count)


def with_wrong_labels(source: Source, share: float) -> Source:
    """That share of the labels for training and validation drawn anew from all classes; those of the test stay."""
    if not share:
        return source
    if np.issubdtype(source.pool_labels.dtype, np.floating):
        raise Refused(f"--wrong-labels draws classes anew, and {source.title} has scores; leave it out.")
    count = len(source.pool_labels)
    drawn = np.random.default_rng([0, 1])  # another stream than that of any seed's split
    chosen = drawn.permutation(count)[: round(share * count)]
    labels = source.pool_labels.copy()
    labels[chosen] = drawn.integers(source.classes, size=len(chosen))
    return replace(source, title=f"{source.title}, {share:.0%} of the labels drawn anew", pool_labels=labels)


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar10-desk": _cifar10_desk,
    "cifar100": _cifar100,
    "folder": _folder,
    "digits-28": _digits_28,
    "sentences": partial(_sentences, "sentences", "made-up sentences"),
    "movie-reviews": partial(_sentences, "movie-reviews", "movie reviews"),
    "tsv": partial(_sentences, "tsv", "sentences"),
    **{name: partial(_sentences, name, name) for name in text.GLUE},
}
