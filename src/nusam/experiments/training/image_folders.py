"""Images in folders, one for each class: which files count, and what is said of those that can't be read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nusam.experiments.errors import Refused

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Folder", "found", "pixels"]

SMALL = 32  # pixels on a side, which the small models are quick with
# What people call an image and torchvision does not look for.
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef")
# More than a byte for a colour, of which a conversion would keep what fits.
DEEP = ("I", "F")


class Folder(NamedTuple):
    """The images below a folder: those of a class lie in the folder of its name, however deep."""

    path: Path
    classes: list[str]
    files: list[Path]
    targets: list[int]


def found(name: str, path: Path) -> Folder:
    """What a folder has; hidden files and folders don't count.

    Args:
        name: of the data set, as it was asked for.
        path: the folder with a folder for each class.

    Raises:
        Refused: if there is no class, or one without images, or an image of a kind that is not read.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS as READ

    kinds = ", ".join(READ)
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise Refused(f"--data {name} needs a folder of images for each class in {path}, and found none; add them.")
    files: list[Path] = []
    targets: list[int] = []
    for target, label in enumerate(classes):
        before = len(files)
        for file in _visible(path / label):
            suffix = file.suffix.lower()
            if suffix in UNREAD:
                raise Refused(f"{file} is no image that can be read, which are {kinds}; convert it, or remove it.")
            if suffix in READ:
                files.append(file)
                targets.append(target)
        if len(files) == before:
            raise Refused(
                f"--data {name} found no image ({kinds}) in the class {path / label}; add some, or remove the folder."
            )
    return Folder(path, classes, files, targets)


def _visible(folder: Path) -> Iterator[Path]:
    """Files at any depth, in an order that is the same everywhere."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def pixels(name: str, root: Path, files: list[Path], image_size: int | None) -> NDArray[np.uint8]:
    """The images as (N, 3, S, S), grey ones in three equal colours, as torchvision's loader has them.

    Args:
        name: of the data set, as it was asked for.
        root: the folder of all of them.
        files: those to read.
        image_size: S: the shorter side is resized to it, and the middle is cut out, as torchvision's ``Resize`` and
            ``CenterCrop`` do; 0 is as they are, and None the same of a command without such an option.

    Raises:
        Refused: if a file can't be read, or they are not of one square size where they are to be as they are.
    """
    from torchvision.transforms import CenterCrop, Compose, Resize

    fit = Compose([Resize(image_size), CenterCrop(image_size)]) if image_size else None
    sizes: set[tuple[int, int]] = set()
    images: list[NDArray[np.uint8]] = []
    for file in files:
        image = _opened(file)
        if fit:
            image = fit(image)
        sizes.add(image.size)
        if len(sizes) > 1 or image.width != image.height:
            shown = " and ".join(f"{width} × {height}" for width, height in sorted(sizes))
            offer = "" if image_size is None else f", or let --image-size {SMALL} do it"
            raise Refused(
                f"--data {name} needs square images, all of one size, and {root} has some of {shown} pixels; crop or "
                f"scale them{offer}."
            )
        images.append(np.asarray(image, np.uint8))
    stacked: NDArray[np.uint8] = np.stack(images).transpose(0, 3, 1, 2)
    return stacked


def _opened(file: Path) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(DEEP):
                raise Refused(
                    f"{file} has more than 8 bits for a pixel (mode {image.mode}), which would be cut off; save it "
                    "with 8 bits."
                )
            if "transparency" in image.info:
                image = image.convert("RGBA")  # as PIL asks for on the way to RGB
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except Refused:
        raise
    except Exception as error:  # whatever a decoder finds wrong with a file
        reason = str(error).split(f" {str(file)!r}")[0].splitlines()[0].removesuffix(".") or type(error).__name__
        raise Refused(f"{file} could not be read as an image ({reason}); replace it, or remove it.") from error
