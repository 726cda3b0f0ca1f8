"""The demo's picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nusam.experiments.pages.looks import LOOK_OF
from nusam.experiments.pages.result import Curve, Result

__all__ = ["learning_and_price"]


def learning_and_price(result: Result, path: Path) -> None:
    """A row for each model: test accuracy over the epochs, and accuracy over the work of a step; bands of one s.e."""
    rows = len(result.panels) // 2
    figure = Figure(figsize=(10, 3.4 * rows + 0.5), layout="constrained", dpi=150, facecolor="white")
    axes = figure.subplots(rows, 2, squeeze=False, sharey="row", width_ratios=(3, 2)).flat
    for ax, (title, curves) in zip(axes, result.panels.items(), strict=True):
        for curve in curves:
            (_point if len(curve.x) == 1 else _line)(ax, curve)
        ax.set(title=title, xlabel=curves[0].x_title, ylabel=curves[0].y_title)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.title} (mean ± standard error of the seeds)")
    figure.savefig(path)


def _line(axes: Axes, curve: Curve) -> None:
    colour, dashes = LOOK_OF[curve.label]
    y = [float("nan") if value is None else value for value in curve.y]
    axes.plot(curve.x, y, color=colour, linestyle=dashes, label=curve.label, linewidth=1.8)
    if curve.error:
        low, high = ([v + sign * e for v, e in zip(y, curve.error, strict=True)] for sign in (-1, 1))
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, loc="lower right")


def _point(axes: Axes, curve: Curve) -> None:
    colour, _ = LOOK_OF[curve.label]
    y = float("nan") if curve.y[0] is None else curve.y[0]
    left = curve.x[0] == 1  # of the base optimizer's points, away from the cheapest other one
    place = (-6 if left else 6, 5 if axes.containers else -12)
    side = "right" if left else "left"
    axes.errorbar(curve.x, [y], curve.error, fmt="o", color=colour, capsize=3)
    axes.annotate(curve.label, (curve.x[0], y), place, textcoords="offset points", fontsize=9, ha=side)
    axes.set_xlim(0.25, 2.25)
    axes.set_xticks([1, 1.25, 1.5, 1.75, 2])
    axes.margins(y=0.1)
