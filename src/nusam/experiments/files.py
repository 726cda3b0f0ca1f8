"""Files that are whole whenever they are read, also if the program was stopped while it wrote them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nusam.experiments.errors import Refused

__all__ = ["save_whole", "write_whole", "writing_to"]


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Refuse, inside, what the system does not let one write into the folder that --out names."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise Refused(f"--out {out} can't be written to ({why}); make room there, or name another folder.") from error


def write_whole(path: Path, text: str) -> None:
    """Replace the file at once; a disk that is full leaves the old one."""
    with _replacing(path) as file:
        file.write(text.encode())


def save_whole(path: Path, content: object) -> None:
    """As :func:`write_whole`, by ``torch.save``.

    Raises:
        OSError: on a full disk too, where torch's writer ends with a RuntimeError about its own position.
    """
    import torch

    try:
        with _replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` if the block ends well, and is gone if not."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
