"""What a search for ρ found, as a picture."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nusam.experiments.pages.looks import LOOKS
from nusam.tools.radius_search import RadiusSearch
from nusam.tools.verdict import Trial

__all__ = ["draw"]

_ALONE = "#000000"


def draw(found: RadiusSearch, path: Path | str) -> None:
    """Draw scores over ρ, a line for each method and share; the suffix of ``path`` says in which format.

    Without a verdict these are the scores, with the base optimizer alone as a level and a dot for each seed. With one
    they are gains over the base optimizer in as many steps or seconds, and the best has its gain on the new seeds
    beside it, with the 95% interval.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    looks = list(LOOKS.values())[1:]
    for number, trials in enumerate(found.lines):
        colour, dashes = looks[number % len(looks)]
        rhos = [trial.rho for trial in trials]
        label = trials[0].label.partition(",")[0]
        axes.plot(rhos, [_drawn(_height(found, t)) for t in trials], color=colour, linestyle=dashes, label=label)
        for seed in range(len(found.base.scores)):
            axes.plot(rhos, [_drawn(_height(found, t, seed)) for t in trials], ".", color=colour, alpha=0.6)
    if found.verdict:
        axes.axhline(0, color=_ALONE, linestyle=(0, (1, 1)), label="base optimizer alone")
        _confirmed(found, axes)
        axes.set_ylabel("gain in score on held-out data")
    else:
        axes.axhline(_drawn(found.base.score), color=_ALONE, linestyle=(0, (1, 1)), label="base optimizer alone")
        axes.set_ylabel("score on held-out data")
    every = sorted({trial.rho for trial in found.trials})
    axes.set_xscale("log")
    shown = every[:: 1 + len(every) // 9]
    axes.set_xticks(shown, [f"{rho:g}" for rho in shown])
    axes.minorticks_off()
    axes.set_xlim(every[0] / 1.2, every[-1] * 1.2)
    axes.set_xlabel("ρ")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _height(found: RadiusSearch, trial: Trial, seed: int | None = None) -> float:
    """Of a point: a score, or a gain where there is a verdict; of one seed or the mean."""
    base = found.rival(trial) if found.verdict else None
    if seed is None:
        return trial.score - (base.score if base else 0.0)
    return trial.scores[seed] - (base.scores[seed] if base else 0.0)


def _confirmed(found: RadiusSearch, axes: Axes) -> None:
    assert found.verdict
    gain, trial = found.verdict.gain, found.verdict.trial
    if not math.isfinite(gain.mean):
        return
    error = gain.half_width if math.isfinite(gain.half_width) else None
    label = f"{trial.label}, on {len(trial.scores)} new seeds"
    beside = trial.rho * 1.05  # the point that was picked stays visible
    axes.errorbar(beside, gain.mean, error, fmt="D", color="#D55E00", capsize=4, markersize=6, label=label, zorder=3)


def _drawn(height: float) -> float:
    """A gap in the line for a training that diverged."""
    return height if math.isfinite(height) else math.nan
