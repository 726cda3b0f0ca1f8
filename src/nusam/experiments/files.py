"""Files that are whole whenever they are read, also if the program was stopped while it wrote them."""

import os
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Replace the file at once; a disk that is full leaves the old one."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
