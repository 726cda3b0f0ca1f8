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

__all__ = ["Folder", "found", "passed_over", "pixels", "require_train_and_test"]

SMALL = 32  # pixels on a side, which the small models are quick with
# What people call an image and torchvision does not look for.
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef")
# More than a byte for a colour, of which a conversion would keep what fits: as a mode, and as its decoder has it.
DEEP, DEEP_RAW = ("I", "F"), (";16", ";12", ";32")
ALL_OF_16 = "'BGR;16'"  # 5, 6 and 5 bits
PHOTOS = ("JPEG", "MPO")  # of which several images are one photo, as telephones make it
HIDDEN = (".", "__MACOSX")


class Folder(NamedTuple):
    """The images below a folder: those of a class lie in the folder of its name, however deep."""

    path: Path
    classes: list[str]
    files: list[Path]
    targets: list[int]
    others: list[Path]
    """Files that are no images, and are passed over."""


def require_train_and_test(name: str, root: Path, or_fetch: str = "") -> None:
    """Refuse a folder without these two, and say where they are, or what is missing.

    Args:
        name: of the data set, as it was asked for.
        root: the folder.
        or_fetch: the end of the sentence, where they can be fetched.
    """
    for part in (root / "train", root / "test"):
        _require_target(part)
    if (root / "train").is_dir() and (root / "test").is_dir():
        return
    others = " or cifar-10-batches-py" if name.startswith("cifar10") else ""
    below = sorted(root.iterdir()) if root.is_dir() else []
    deeper = [folder for folder in below if (folder / "train").is_dir() and (folder / "test").is_dir()]
    seen = [folder.name for folder in below if folder.is_dir() and not folder.name.startswith(HIDDEN)]
    there = {"train", "test"} & set(seen)
    has = f"only {', '.join(seen[:3])}" if there else "a file" if root.is_file() else "neither"
    if root.name in ("train", "test") and not deeper:
        deeper = [root.parent]
    todo = f"point --data-root to them{f', such as {deeper[0]}' if deeper else ''}"
    if there:
        todo = f"add {', '.join({'train', 'test'} - there)}, or rename what holds those images"
    raise Refused(
        f"--data {name} needs the folders train and test, with a folder of images for each class,{others} in "
        f"--data-root, which is {root}, and found {has}; {todo}{or_fetch}."
    )


def found(name: str, path: Path) -> Folder:
    """What a folder has; hidden files and folders don't count.

    Args:
        name: of the data set, as it was asked for.
        path: the folder with a folder for each class.

    Raises:
        Refused: if there is no class, or one without images, or an image of a kind that is not read, or a link that
            leads nowhere.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS as READ

    kinds = ", ".join(READ)
    visible = sorted(entry for entry in path.iterdir() if not entry.name.startswith(HIDDEN))
    for entry in visible:
        _require_target(entry)
    classes = [entry.name for entry in visible if entry.is_dir()]
    if not classes:
        raise Refused(f"--data {name} needs a folder of images for each class in {path}, and found none; add them.")
    others = [entry for entry in visible if entry.is_file()]
    for entry in others:
        if entry.suffix.lower() in (*READ, *UNREAD):
            raise Refused(f"{entry} lies beside the folders of the classes; move it into one of them, or remove it.")
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
            else:
                others.append(file)
        if len(files) == before:
            raise Refused(
                f"--data {name} found no image ({kinds}) in the class {path / label}; add some, or remove the folder."
            )
    return Folder(path, classes, files, targets, others)


def _require_target(path: Path) -> None:
    """Refuse a link that leads nowhere: nobody can tell what it would add."""
    if path.is_symlink() and not path.exists():
        raise Refused(f"{path} could not be read as an image or a folder (the link leads nowhere); mend or remove it.")


def _visible(folder: Path) -> Iterator[Path]:
    """Files at any depth, in an order that is the same everywhere."""

    def refuse(error: OSError) -> None:
        raise Refused(f"{error.filename} can't be read ({error.strerror}); let it be read, or remove it.") from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place)
        above = [parent.resolve() for parent in here.parents if parent.is_relative_to(folder)]
        if here.resolve() in (*above, *folder.resolve().parents):
            raise Refused(f"{here} is a link to a folder that it lies in; remove it.")
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        for path in (here / name for name in sorted(names) if not name.startswith(HIDDEN)):
            _require_target(path)
            if path.is_file():
                yield path


def passed_over(others: list[Path]) -> tuple[str, ...]:
    """A note on files that are no images, if there are any."""
    if not others:
        return ()
    kinds = ", ".join(sorted({path.suffix or path.name for path in others})[:5])
    are = "file that is no image is" if len(others) == 1 else "files that are no images are"
    return (f"{len(others)} {are} passed over ({kinds}).",)


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
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if _is_deep(image):
                raise Refused(f"{file} has more than 8 bits for a colour, which would be cut off; save it with 8 bits.")
            count = getattr(image, "n_frames", 1)
            if count > 1 and image.format not in PHOTOS:
                parts = "pages" if image.format == "TIFF" else "frames"
                raise Refused(f"{file} has {count} {parts}, of which one would be seen; save that alone.")
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info:
                image = image.convert("RGBA")  # as PIL asks for on the way to RGB
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except Refused:
        raise
    except Exception as error:  # whatever a decoder finds wrong with a file
        said = getattr(error, "strerror", None) or str(error).split(f" {str(file)!r}")[0] or type(error).__name__
        reason = said.splitlines()[0].removesuffix(".")
        raise Refused(f"{file} could not be read as an image ({reason}); replace it, or remove it.") from error


def _is_deep(image: "Image.Image") -> bool:
    """Whether a colour has more than 8 bits, by the mode, or by what the decoder is told of the file."""
    told = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":  # (mode, largest value)
        return any(isinstance(args, tuple) and args[1] > 255 for args in told) or image.mode.startswith(DEEP)
    raw = str(told).replace(ALL_OF_16, "")
    return image.mode.startswith(DEEP) or any(kind in raw for kind in DEEP_RAW)
