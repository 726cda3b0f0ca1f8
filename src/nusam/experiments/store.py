"""Finished runs, one line each, in a file that only grows: what is there is never run again."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nusam.experiments.errors import Refused
from nusam.experiments.results import device_name
from nusam.experiments.training import Epoch, Outcome, Recipe, Run

__all__ = ["Cell", "Store"]


@dataclass(frozen=True)
class Cell:
    """A run and all that its outcome depends on, seed and machine apart from nothing."""

    data: str
    recipe: Recipe
    run: Run
    train_size: int | None = None
    pretrained: str = ""  # the weights it starts from: key of the run that made them, and what they are

    @property
    def key(self) -> str:
        """The same for the same cell, in any process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The runs of a folder, in ``runs.jsonl``.

    Raises:
        Refused: if the folder can't be written to, or the file is no store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "runs.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError as error:
            raise Refused(
                f"The results folder {folder} can't be written to ({error.strerror}); name another folder."
            ) from error
        self._outcomes: dict[str, Outcome] = {}
        for row in self._rows():
            self._outcomes[row["key"]] = Outcome(
                run=Run(**row["cell"]["run"]),
                epochs=[Epoch(loss, accuracy) for loss, accuracy in row["epochs"]],
                validation_accuracy=row["validation_accuracy"],
                delay_steps=row["delay_steps"],
                perturbation_numel=row["perturbation_numel"],
                seconds=row["seconds"],
            )

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._outcomes

    def __getitem__(self, cell: Cell) -> Outcome:
        return self._outcomes[cell.key]

    def weights(self, pretrained: str) -> Path:
        """Where a pretrained model is kept; by the key of its run, with or without what its weights are."""
        return self.folder / "weights" / f"{pretrained.partition('-')[0]}.pt"

    def __len__(self) -> int:
        return len(self._outcomes)

    def add(self, cell: Cell, outcome: Outcome, device: torch.device) -> None:
        """Append a finished run; a disk that is full leaves what was there."""
        row = {
            "key": cell.key,
            "cell": asdict(cell),
            "validation_accuracy": outcome.validation_accuracy,
            "epochs": [[epoch.train_loss, epoch.test_accuracy] for epoch in outcome.epochs],
            "delay_steps": outcome.delay_steps,
            "perturbation_numel": outcome.perturbation_numel,
            "seconds": round(outcome.seconds, 2),
            "device": device_name(device),
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("nusam", "torch", "timm")},
        }
        line = (json.dumps(row) + "\n").encode()
        before = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self._path, before)
            raise Refused(
                f"{self._path} could not be written ({error.strerror}); make room and run the command again: what was "
                "finished is kept."
            ) from error
        self._outcomes[cell.key] = outcome

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Every row; a line that a crash cut short is cut off."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                row["key"], row["cell"], row["epochs"]
            except (ValueError, KeyError, TypeError) as error:
                raise Refused(
                    f"{self._path}, line {number}, is no finished run; remove it, or name another folder."
                ) from error
            yield row
