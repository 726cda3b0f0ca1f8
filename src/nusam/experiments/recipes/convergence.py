"""Figure 1: how fast each perturbation lets gradient descent converge, and what the paper says of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.recipes.theory import Array, Setting, Trace, simulate, slopes

__all__ = ["fig1"]


FIGURE = ("GD", "SAM", "νSAM", "GaussSAM")
PAPER = {"GD": -1.0, "SAM": -2.0, "νSAM": -2.0, "GaussSAM": 0.0}
FROZEN = "GaussSAM, one draw for all steps"
LEAST_DECADES = 2  # of a fit to min ‖∇f‖²
ENVELOPE_DECADES = 1  # of a fit to the envelope; before that νSAM may not have come down to it


def fig1(steps: int, seeds: int, scale: str) -> Result:
    """Figure 1: the four methods with γ_k·L = 1/(2k) and ρ = 0.1, and what makes GaussSAM look as in the paper."""
    base = Setting(steps=steps, seeds=seeds)
    far = replace(base, rho=1000.0, distance=1.0)
    figure = [(method, method, base) for method in FIGURE]
    others = [
        ("GaussSAM, ρ = 1000·‖x⁰−b‖", "GaussSAM", far),
        ("νSAM, ρ = 1000·‖x⁰−b‖", "νSAM", far),
        ("GD from the same start", "GD", far),
        (FROZEN, FROZEN, base),
        ("GaussSAM, constant γL = 1/2", "GaussSAM", replace(base, decay=0.0)),
        ("νSAM, constant γL = 1/2", "νSAM", replace(base, decay=0.0)),
    ]
    traces = {label: simulate(method, setting) for label, method, setting in figure + others}
    rows = [_row(label, method, setting, traces[label]) for label, method, setting in figure + others]
    curves = [_curve("min ‖∇f(xⁱ)‖², i < k", m, traces[m].k, traces[m].least) for m in FIGURE]
    curves += [_curve("the larger of the last two ‖∇f(xⁱ)‖²", m, traces[m].k, traces[m].envelope) for m in FIGURE]
    nonconvergence = "where GaussSAM looks nonconvergent: min ‖∇f(xⁱ)‖²"
    curves += [_curve(nonconvergence, label, traces[label].k, traces[label].least) for label, _, _ in others]
    return Result(
        name="fig1",
        title="Figure 1: min ‖∇f(xⁱ)‖² on a quadratic, by the perturbation's direction",
        scale=scale,
        data="",
        columns=list(rows[0]),
        rows=rows,
        curves=curves,
        findings=_findings(rows, steps),
        notes=[
            "The paper does not say L, b, the start, ρ, the dimension or the number of seeds. Ours: L = 1, 4×3 "
            "matrices, N(0, 1) entries of b and x⁰ − b, ρ = 0.1.",
            "γ_k·L = 1/(2k): the paper's γ_k = 1/k with L = 1/2, the only L for which GD has the figure's O(1/k).",
            "A slope is that of the envelope, the larger of the last two ‖∇f‖²: least squares in log-log over the last "
            f"{10**ENVELOPE_DECADES}-fold of k, on points evenly spaced in log k; that of min ‖∇f‖² is over the last "
            f"{10**LEAST_DECADES}-fold, or that before it rounds to zero. Mean ± standard error over the seeds.",
            "Curves are medians over the seeds; a gap is an exact zero.",
            "νSAM takes one warm-started power iteration per step.",
        ],
    )


def _row(label: str, method: str, setting: Setting, trace: Trace) -> dict[str, Any]:
    least = slopes(trace.k, trace.least, LEAST_DECADES)
    envelope = slopes(trace.k, trace.envelope, ENVELOPE_DECADES)
    in_figure = label in FIGURE
    return {
        "method": label,
        "paper": PAPER[method] if in_figure else None,
        "slope": _rounded(fmean(envelope)),
        "s.e.": _rounded(_standard_error(envelope)),
        "slope of the minimum": _rounded(fmean(least)),
        "its s.e.": _rounded(_standard_error(least)),
        "last ÷ first min ‖∇f‖²": float(np.median(trace.least[-1] / trace.least[0])),
    }


def _rounded(value: float | None) -> float | None:
    """To what a slope means; a fit to a constant has 1e-33."""
    return value if value is None or not math.isfinite(value) else round(value, 3) + 0.0


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return stdev(values) / math.sqrt(len(values))


def _curve(panel: str, label: str, k: Array, y: Array) -> Curve:
    median = [value if value > 0 else None for value in np.median(y, axis=1).tolist()]
    return Curve(panel, label, k.tolist(), median, "k", "‖∇f‖²", log_x=True, log_y=True)


def _findings(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    by_label = {row["method"]: row for row in rows}
    gd, sam, nu, gauss = (by_label[method] for method in FIGURE)

    def fit(row: Mapping[str, Any]) -> str:
        error = "" if row["s.e."] is None else f" ± {row['s.e.']:.2g}"
        return f"{row['slope']:.2f}{error}"

    def verdict(agrees: bool) -> str:
        return "is reproduced" if agrees else "is not reproduced"

    fast = max(sam["slope"], nu["slope"]) <= -1.85
    lines = [
        f"- **GD**: slope {fit(gd)}; the paper's O(1/k) {verdict(abs(gd['slope'] + 1) <= 0.05)}.",
        f"- **SAM and νSAM**: slopes {fit(sam)} and {fit(nu)}; the paper's O(1/k²), an upper bound, {verdict(fast)}. "
        "The minimum, which the figure shows, falls faster than any power, because the iterates step over the solution "
        "and now and then land close to it.",
        f"- **GaussSAM**: slope {fit(gauss)}; the paper's nonconvergence {verdict(gauss['slope'] > -0.5)}. The noise "
        "has zero mean and Σγ_k² is finite, so E‖∇f‖² tends to 0 for every ρ, dimension and c > 0, here as log(k)/k. "
        "What the gradient's direction buys is a rate, 1/k² instead of 1/k, not convergence.",
        "- GaussSAM's curve is as flat as the paper's where the minimum is the start itself (with ρ = 1000·‖x⁰ − b‖, "
        "E‖∇f‖² is below the start's only after 4 million steps), where one ε serves all steps, or with constant "
        "steps, with which νSAM stays in a neighbourhood too.",
    ]
    if steps < 100_000:
        lines.append(f"- {steps} steps are too few for the slopes to have settled; judge by 100 000.")
    return "\n".join(lines)
