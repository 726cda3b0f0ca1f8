"""Learning curves as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from nusam.experiments.pages.looks import LOOKS
from nusam.experiments.runs.rho_selection import Plan
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES

__all__ = ["learning_curves"]


def learning_curves(plan: Plan, title: str, path: Path) -> None:
    """Test accuracy and training loss over the epochs, a row for each model: means of the seeds, bands of one s.e."""
    rows = len(plan.models)
    figure = Figure(figsize=(10, 3.4 * rows + 0.5), layout="constrained", dpi=150)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    for model, (accuracy, loss) in zip(plan.models, axes, strict=True):
        for contest in plan.radii:
            outcomes = plan.chosen_outcomes(contest)
            if contest.model == model and outcomes:
                _band(accuracy, contest.method, np.array([[e.test_accuracy for e in o.epochs] for o in outcomes]))
                _band(loss, contest.method, np.array([[e.train_loss for e in o.epochs] for o in outcomes]))
        _dress(accuracy, loss, TITLES[model])
    for bottom in axes[-1]:
        bottom.set_xlabel("epoch")
    figure.suptitle(f"{title} (mean ± standard error of the seeds)")
    figure.savefig(path)


def _band(axes: Axes, method: str, curves: NDArray[np.float64]) -> None:
    colour, dashes = LOOKS[method]
    epochs = np.arange(1, curves.shape[1] + 1)
    mean = curves.mean(0)
    error = curves.std(0, ddof=1) / np.sqrt(len(curves)) if len(curves) > 1 else np.zeros_like(mean)
    axes.plot(epochs, mean, color=colour, linestyle=dashes, label=METHODS[method].title, linewidth=1.8)
    axes.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def _dress(accuracy: Axes, loss: Axes, model: str) -> None:
    accuracy.set_ylabel(f"{model}\ntest accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    loss.set_ylabel("training loss")
    loss.set_yscale("log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if loss.lines:
        loss.legend(frameon=False)
        _leave_out_the_climb(accuracy)


def _leave_out_the_climb(accuracy: Axes) -> None:
    """Early epochs gain so much that the methods would look alike at the end."""
    curves = [np.asarray(line.get_ydata()) for line in accuracy.lines]
    lowest = min(curve[len(curve) // 3 :].min() for curve in curves)
    room = max(0.2 * (max(curve.max() for curve in curves) - lowest), 0.005)
    accuracy.set_ylim(lowest - room, max(curve.max() for curve in curves) + room)
