"""results.json: everything that a comparison did and found."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from statistics import fmean
from typing import Any

from nusam.experiments.files import write_whole
from nusam.experiments.pages.table import Row
from nusam.experiments.runs.rho_selection import Plan
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.spec import Outcome

__all__ = ["write"]


def write(path: Path, settings: Mapping[str, Any], plan: Plan, table: Sequence[Row]) -> None:
    """Replace the file at once, so that it is whole whenever it is read or the program is stopped."""
    content = {
        **settings,
        "versions": {"python": python_version(), **{name: version(name) for name in ("nusam", "torch", "timm")}},
        "runs_planned": plan.runs(),
        "runs_finished": len(plan.outcomes),
        "table": [asdict(row) for row in table],
        "rho_selection": _selection(plan),
        "runs": [_run(outcome) for outcome in plan.outcomes],
    }
    write_whole(path, json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")


def _selection(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "model": contest.model,
            "method": contest.method,
            "delay": METHODS[contest.method].delay,
            "chosen_rho": plan.chosen.get(contest),
            "trials": [
                {"rho": rho, "validation_accuracy": fmean(accuracies), "seeds": len(accuracies)}
                for rho, accuracies in plan.trials(contest).items()
            ],
        }
        for contest in plan.radii
    ]


def _run(outcome: Outcome) -> dict[str, Any]:
    return {
        **{name: asdict(outcome.run)[name] for name in ("model", "method", "rho", "seed")},
        "validation_accuracy": outcome.validation_accuracy,
        "test_accuracy": outcome.test_accuracy,
        "delay_steps": outcome.delay_steps,
        "seconds": round(outcome.seconds, 3),
        # JSON has no NaN, which a diverged run's loss is.
        "train_loss": [e.train_loss if math.isfinite(e.train_loss) else None for e in outcome.epochs],
        "test_accuracy_curve": [e.test_accuracy for e in outcome.epochs],
    }
