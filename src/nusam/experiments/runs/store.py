"""Finished runs, one line each, in a file that only grows: what is there is never run again."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from datetime import date
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nusam.experiments.errors import Refused
from nusam.experiments.files import locked
from nusam.experiments.training.devices import device_name
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Run

if TYPE_CHECKING:
    import torch

__all__ = ["Cell", "Store"]


@dataclass(frozen=True)
class Cell:
    """A run and all that its outcome depends on, seed and machine apart from nothing."""

    data: str
    recipe: Recipe
    run: Run
    train_size: int | None = None
    pretrained: str = ""  # the weights it starts from: key of the run that made them, and what they are
    files: str = ""  # what data of one's own are

    @property
    def key(self) -> str:
        """The same for the same cell, in any process."""
        described = asdict(self)
        if self.run.ascent_share == 1:  # results of before there were these keep their keys
            del described["run"]["ascent_share"]
        if not self.files:
            del described["files"]
        if not self.run.one_pass:
            del described["run"]["one_pass"]
        if not self.recipe.wrong_labels:
            del described["recipe"]["wrong_labels"]
        if self.recipe.beta2 is None:
            del described["recipe"]["beta2"]
        if not self.recipe.validates_epochs:
            del described["recipe"]["validates_epochs"]
        if self.recipe.scored_every == 1:
            del described["recipe"]["scored_every"]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The runs of a folder, in ``runs.jsonl``.

    Raises:
        Refused: if the folder can't be written to, or the file is no store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "runs.jsonl"
        self._outcomes: dict[str, Outcome] = {}
        self._file: FileIO | None = None  # open while this process alone may write
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            content = self._path.read_bytes()
        except OSError as error:
            raise self._unwritable(error) from error
        self._take(content)

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._outcomes

    def __getitem__(self, cell: Cell) -> Outcome:
        return self._outcomes[cell.key]

    def weights(self, pretrained: str) -> Path:
        """Where a pretrained model is kept; by the key of its run, with or without what its weights are."""
        return self.folder / "weights" / f"{pretrained.partition('-')[0]}.pt"

    def __len__(self) -> int:
        return len(self._outcomes)

    def pretrained(self, key: str) -> "dict[str, torch.Tensor]":
        """The weights of a pretrained model.

        Raises:
            Refused: if they can't be read.
        """
        import torch

        path = self.weights(key)
        try:
            weights = torch.load(path, map_location="cpu")
            if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
                raise TypeError("no weights")
        except Exception as error:  # whatever pickle finds wrong with it
            raise Refused(f"{path} holds no weights that can be read; remove it, and they are trained anew.") from error
        return weights

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process writes to the folder; what others have added before is known.

        The lock is the kernel's: it vanishes with the process, however that ends. It may be taken again inside.

        Raises:
            Refused: if another process has it.
        """
        if self._file is not None:
            yield
            return
        try:
            self._file = FileIO(self._path, "a+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not locked(self._file):
                raise Refused(
                    f"The results folder {self.folder} is being filled by another process; wait for it, or name "
                    "another folder."
                )
            self._file.seek(0)
            content = self._file.readall()
            self._take(content)
            self._file.truncate(content.rfind(b"\n") + 1)  # a line that a crash cut short goes
            yield
        finally:
            self._file.close()
            self._file = None

    def add(self, cell: Cell, outcome: Outcome, device: "torch.device | str") -> None:
        """Append a finished run; a disk that is full leaves what was there."""
        row = {
            "key": cell.key,
            "cell": asdict(cell),
            "validation_accuracy": outcome.validation_accuracy,
            "epochs": [[value for value in astuple(epoch) if value is not None] for epoch in outcome.epochs],
            "delay_steps": outcome.delay_steps,
            "perturbation_numel": outcome.perturbation_numel,
            "seconds": round(outcome.seconds, 2),
            "device": device_name(device),
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("nusam", "torch", "timm")},
        }
        with self.locked():
            if cell in self:
                return
            try:
                self._append((json.dumps(row) + "\n").encode())
            except OSError as error:
                raise Refused(
                    f"{self._path} could not be written ({error.strerror}); put that right and run the command again: "
                    "what was finished is kept."
                ) from error
        self._outcomes[cell.key] = outcome

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it, also where an interrupt comes in between."""
        assert self._file is not None
        opened = os.fstat(self._file.fileno())
        if not os.path.samestat(opened, self._path.stat()):
            raise OSError(errno.ESTALE, "another file is in its place")
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(opened.st_size)
            raise

    def _take(self, content: bytes) -> None:
        """Learn every whole line; what follows the last is another process's, or what a crash left of one."""
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                self._outcomes[row["key"]] = _outcome(row)
            except (ValueError, KeyError, TypeError, AttributeError, Refused) as error:
                raise Refused(
                    f"{self._path}, line {number}, is no finished run; remove it, or name another folder."
                ) from error

    def _unwritable(self, error: OSError) -> Refused:
        return Refused(f"The results folder {self.folder} can't be written to ({error.strerror}); name another folder.")


def _outcome(row: dict[str, Any]) -> Outcome:
    """Of a row, whose numbers must be numbers."""
    epochs = [Epoch(float(loss), *map(float, accuracies)) for loss, *accuracies in row["epochs"]]
    if not epochs or epochs[-1].test_accuracy is None:
        raise ValueError("no last score")
    return Outcome(
        run=Run(**row["cell"]["run"]),
        epochs=epochs,
        validation_accuracy=float(row["validation_accuracy"]),
        delay_steps=int(row["delay_steps"]),
        perturbation_numel=int(row["perturbation_numel"]),
        seconds=float(row["seconds"]),
    )
