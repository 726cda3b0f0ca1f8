"""Whether a method helps: the best trial of a search against the base optimizer in as many steps, and seconds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from nusam.tools.arguments import check_function, check_network

__all__ = ["Gain", "Trial", "Verdict", "gain_over"]


class Gain(NamedTuple):
    """A mean difference of scores, seed by seed."""

    mean: float
    half_width: float
    """Half of its 95% interval by Student's t; infinite where nothing is known of it, as with one seed."""

    @property
    def helps(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.mean > self.half_width

    def __str__(self) -> str:
        if not math.isfinite(self.half_width):
            text = f"{self.mean:+.3g}"
        else:
            places = 2 if self.half_width == 0 else min(12, max(0, 1 - math.floor(math.log10(self.half_width))))
            text = f"{self.mean:+.{places}f} ± {self.half_width:.{places}f}"
        return text.replace("-", "−")


@dataclass(frozen=True)
class Trial:
    """One method with one radius; the base optimizer alone has ρ = 0."""

    method: str
    rho: float
    scores: tuple[float, ...]
    """By seed; −∞ for a training that ended in a loss that is not finite."""
    ascent_share: float = 1.0
    """Of each batch, that the ascents saw."""
    steps: int = 0
    """Of each training."""
    seconds: tuple[float, ...] = field(default=(), compare=False)
    """That each training took, by seed."""

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return fmean(self.scores)

    @property
    def label(self) -> str:
        """Method, share and ρ in words."""
        share = "" if self.ascent_share == 1 else f" at {_fraction(self.ascent_share)}"
        return f"{self.method}{share}" + (f", ρ = {self.rho:g}" if self.rho else "")


@dataclass(frozen=True)
class Verdict:
    """The best trial of a search once more, on seeds that took no part in the choice; ``str()`` is one sentence.

    The base optimizer was trained twice: for as many steps as the method, and for as many seconds as the method took,
    which are more steps. The better of the two is what the method is compared with. The interval is over seeds: orders
    of the batches and dropout masks. It knows nothing of other initial weights, or of other held-out data than those
    by which ρ was chosen.
    """

    trial: Trial
    """The method, on the new seeds."""
    base: Trial
    """The base optimizer alone on the same seeds: the better of as many steps and as many seconds."""
    price: float
    """Seconds of a training with the method, over those of as many steps of the base optimizer alone."""
    tried: int
    """Trials of which this was the best."""
    beyond: float | None
    """None if a smaller and a larger ρ did worse in the search; else the next ρ to try, on the side that is open."""
    alike: bool
    """Whether every seed trained alike, so that nothing can be told from chance."""
    weights: dict[str, Any] = field(repr=False, compare=False)
    """State dict of the model to go on from: of the seed with the best score, of the method if it helps, else of the
    base optimizer."""
    optimizer_state: dict[str, Any] = field(repr=False, compare=False)
    """State dict of its optimizer, with the learning rate that the base optimizer came with."""
    wrap: Callable[..., Optimizer] = field(repr=False, compare=False)
    """Makes the method of a base optimizer and ``model=``, with the ρ, delay and share of the trial."""

    @property
    def gain(self) -> Gain:
        """Of the method over the better of the base optimizer in as many steps and in as many seconds."""
        gain = gain_over(self.trial, self.base)
        return gain._replace(half_width=math.inf) if self.alike else gain

    @property
    def helps(self) -> bool:
        """Whether the whole interval of the gain lies above 0."""
        return self.gain.helps

    @property
    def bracketed(self) -> bool:
        """Whether a smaller and a larger ρ did worse in the search."""
        return self.beyond is None

    def go_on(self, model: nn.Module, base: Callable[[nn.Module], Optimizer]) -> Optimizer:
        """Load the weights into a model, and give its optimizer, in the state in which the best training left it.

        Args:
            model: one like the model that was handed to :func:`nusam.find_rho`, or that itself.
            base: as it was handed over there.

        Returns:
            the method around the base optimizer if it helps, else the base optimizer alone.
        """
        check_network(model)
        check_function("base", base, "a model")
        model.load_state_dict(self.weights)
        optimizer = base(model)
        if self.helps:
            optimizer = self.wrap(optimizer, model=model)
        optimizer.load_state_dict(self.optimizer_state)
        return optimizer

    def __str__(self) -> str:
        if not math.isfinite(self.base.score):
            return "The base optimizer alone ends in no finite score; lower its learning rate and try again."
        best = f"{self.trial.label}, the best of {self.tried}"
        if not math.isfinite(self.trial.score):
            failed = sum(not math.isfinite(score) for score in self.trial.scores)
            return f"No gain seen; leave it off ({best}, ended in no finite score on {failed} new seeds)."
        if self.alike:
            return (
                f"No verdict: every seed trained alike, so that {self.gain} of {self.trial.label} can't be told from "
                "chance; give a loader that shuffles."
            )
        open_end = "" if self.beyond is None else f"; not bracketed, try ρ = {self.beyond:g} too"
        shorter = self.price > 1 and self.base.steps == self.trial.steps
        over = " over the base optimizer in as many steps, which did no better in as many seconds," if shorter else ""
        told = f"{self.gain}{over} for {_time(self.price)}{open_end}"
        if self.helps:
            return f"{self.trial.label}: {told}."
        seen = "A loss" if -self.gain.mean > self.gain.half_width else "No gain seen"
        return f"{seen}; leave it off ({best}: {told})."


def gain_over(trial: Trial, base: Trial) -> Gain:
    """Of one trial over another on the same seeds."""
    pairs = zip(trial.scores, base.scores, strict=True)
    differences = [0.0 if a == b else a - b for a, b in pairs]  # also of two trainings that diverged
    diverged = -math.inf in differences  # then the method can't make up for it where the other one does
    mean = -math.inf if diverged else fmean(differences)
    if len(differences) < 2 or not math.isfinite(mean):
        return Gain(mean, math.inf)
    return Gain(mean, _quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences)))


def per_step(trials: Sequence[Trial]) -> float:
    """Seconds of a step, by the training that was disturbed least."""
    return min(seconds / trial.steps for trial in trials for seconds in trial.seconds)


def _quantile(freedom: int) -> float:
    """t with P(|T| < t) = 0.95 for Student's T: Abramowitz & Stegun 26.7.3 and 26.7.4, and bisection."""

    def inside(angle: float) -> float:
        odd = freedom % 2
        term = math.cos(angle) if odd else 1.0
        total = 0.0
        for number in range(1, freedom // 2 + 1):
            total += term
            term *= math.cos(angle) ** 2 * (2 * number - 1 + odd) / (2 * number + odd)
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _fraction(share: float) -> str:
    simple = Fraction(share).limit_denominator(64)
    return str(simple) if math.isclose(simple, share, rel_tol=1e-9) else f"{share:g}"


def _time(price: float) -> str:
    return "no more time" if price < 1.005 else f"{price - 1:.0%} more time"
