"""Files that are whole whenever they are read, also if the program was stopped while it wrote them."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from nusam.experiments.errors import Refused

try:
    import fcntl
except ImportError:  # Windows: folders are then not guarded
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone_in", "locked", "save_whole", "write_json", "write_whole", "writing_to"]


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Refuse, inside, what the system does not let one write into the folder that --out names."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise Refused(f"--out {out} can't be written to ({why}); make room there, or name another folder.") from error


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Inside, no other process fills the folder that --out names; the lock vanishes with the process.

    Raises:
        Refused: if another one does.
    """
    if fcntl is None:  # where a folder can't be opened either
        yield
        return
    with writing_to(out):
        folder = os.open(out, os.O_RDONLY)
    try:
        if not locked(folder):
            raise Refused(f"--out {out} is being filled by another process; wait for it, or name another folder.")
        yield
    finally:
        os.close(folder)


def locked(opened: int | FileIO) -> bool:
    """Whether the kernel's lock on a file or folder is ours now, or there are none, and not another process's."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def write_json(path: Path, content: Any) -> None:
    """As :func:`write_whole`; a number that is not finite, which JSON does not have, becomes null."""
    write_whole(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


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
