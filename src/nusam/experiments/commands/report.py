"""``nusam report``: every saved result of the paper's experiments on one page that needs no network."""

from dataclasses import dataclass
from pathlib import Path

from nusam.experiments.errors import Refused
from nusam.experiments.files import write_whole
from nusam.experiments.pages.result import Result, read_all

__all__ = ["Report"]

USUAL = (Path("docs/results"), Path("runs/results"))  # of a clone, and where nusam reproduce saves


@dataclass(frozen=True)
class Report:
    """Gather saved results into one HTML page: tables beside the paper's, figures, findings.

    The page needs no network and can be sent as a single file, read on a phone and printed.
    """

    results: Path | None = None
    """Folder of saved results, JSON files; docs/results unless given, or runs/results where there is none."""
    out: Path = Path("runs/report.html")
    """The page to write."""

    def __call__(self) -> int:
        """Write it; the exit code."""
        results = _read(self.results or next(filter(Path.is_dir, USUAL), USUAL[0]))
        from nusam.experiments.pages.page import page

        _write(self.out, page(results))
        print(f"{len(results)} result{'s' * (len(results) != 1)} in {self.out}.")
        return 0


def _read(folder: Path) -> list[Result]:
    if not folder.is_dir():
        raise Refused(f"--results must be a folder of saved results, got {folder}; run an experiment or name another.")
    results = read_all(folder)
    if not results:
        raise Refused(f"{folder} has no saved results (.json); run an experiment, or name another folder.")
    return results


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise Refused(f"--out {path} can't be written ({error.strerror}); name another file.") from error
