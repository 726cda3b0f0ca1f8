"""Draw the measured sweeps of docs/results as the pictures that the pages show.

python docs/figures.py [FOLDER]
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from nusam.experiments.pages.looks import LOOK_OF
from nusam.experiments.pages.result import Curve, Result, read_all

DOCS = Path(__file__).parent
SWEEPS = re.compile(r"fig[2345]")


def main(folder: Path = DOCS / "assets") -> None:
    """A picture for every sweep that there is, named like its result."""
    for result in read_all(DOCS / "results"):
        if SWEEPS.fullmatch(result.name) and result.curves:
            draw(result, folder / Path(result.file_name).with_suffix(".svg").name)


def draw(result: Result, path: Path) -> None:
    """Every panel of a sweep side by side, on a light ground of its own; the same bytes for the same result."""
    panels = result.panels
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": path.stem, "font.size": 10}):
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained", facecolor="white")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, curves) in zip(row, panels.items(), strict=True):
            _plot(axes, title, curves)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _plot(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    for curve in curves:
        colour, dashes = LOOK_OF[curve.label]
        y = [float("nan") if value is None else value for value in curve.y]
        level = len(curve.x) == 2 and y[0] == y[1]  # of the base optimizer alone, which has no ρ
        marker = "" if level else "o"
        axes.plot(curve.x, y, color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=curve.label)
        if curve.error:
            low, high = zip(*((value - e, value + e) for value, e in zip(y, curve.error, strict=True)), strict=True)
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(title=title, xlabel=curves[0].x_title, ylabel=curves[0].y_title)
    if curves[0].log_x:
        axes.set_xscale("log")
        _measured_ticks(axes.xaxis, [x for curve in curves for x in curve.x])
    if curves[0].log_y:
        axes.set_yscale("log")
        _measured_ticks(axes.yaxis, [y for curve in curves for y in curve.y if y])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _measured_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Of a logarithmic axis: a tick where something was measured, as far as there is room."""
    room = (max(values) / min(values)) ** (1 / 12)
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] > room:
            ticks.append(value)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
