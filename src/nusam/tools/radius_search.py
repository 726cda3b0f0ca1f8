"""Which ρ to take, and whether any helps: short trainings of copies of a model, one for every method and radius."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.guards.checks import check_count, check_share
from nusam.methods import SAM, NuSAM
from nusam.tools.arguments import (
    check_batches,
    check_function,
    check_gradients_can_be_had,
    check_method,
    check_network,
    check_several,
    checked_radii,
    listed,
)
from nusam.tools.generators import Generators
from nusam.tools.trainings import Method, Trained, Trainings, first, values
from nusam.tools.verdict import Gain, Trial, Verdict, gain_over, per_step

__all__ = ["RadiusSearch", "Trial", "find_rho"]

RHOS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
FURTHER = 6  # radii at most that are added for a method: six doublings
ALONE = "base optimizer"


@dataclass(frozen=True)
class RadiusSearch:
    """What :func:`find_rho` found."""

    base: Trial
    """The base optimizer alone."""
    trials: tuple[Trial, ...]
    """By method, then by share, then by ρ."""
    at_equal_seconds: Mapping[tuple[str, float], Trial] = field(default_factory=dict)
    """The base optimizer alone for as many seconds as a method takes, by method and share; with ``confirm`` only."""
    verdict: Verdict | None = None
    """The best of all trials on new seeds; with ``confirm`` only."""

    @property
    def lines(self) -> list[list[Trial]]:
        """The trials of each method and share, by ρ."""
        lines: dict[tuple[str, float], list[Trial]] = {}
        for trial in self.trials:
            lines.setdefault((trial.method, trial.ascent_share), []).append(trial)
        return list(lines.values())

    def suggestion(self, method: str) -> Trial:
        """The trial with the best mean score; of equal ones, the smallest ρ."""
        trials = [trial for trial in self.trials if trial.method == method]
        if not trials:
            tried = ", ".join(dict.fromkeys(trial.method for trial in self.trials))
            raise ValueError(f"There is no trial of {method!r}; name one that was tried: {tried}.")
        return _best(trials)

    @property
    def suggestions(self) -> dict[str, float]:
        """ρ by method; 0 where every radius did worse than the base optimizer alone, in as many steps."""
        best = {trial.method: self.suggestion(trial.method) for trial in self.trials}
        return {method: trial.rho if trial.score > self.base.score else 0.0 for method, trial in best.items()}

    def rival(self, trial: Trial) -> Trial:
        """The better of the base optimizer alone in as many steps, and in as many seconds if that was tried."""
        return _best((self.base, self.at_equal_seconds.get((trial.method, trial.ascent_share), self.base)))

    def gain(self, trial: Trial) -> Gain:
        """Over the base optimizer alone, in as many steps or in as many seconds: whichever serves it better.

        The seeds are those by which the best trial is picked: of that one it says too much.
        """
        return gain_over(trial, self.rival(trial))

    def bracketed(self, trial: Trial) -> bool:
        """Whether a smaller and a larger ρ of the same method and share did worse."""
        return not any(_open(trial, self.trials))


def find_rho(
    model: nn.Module,
    base: Callable[[nn.Module], Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Any],
    validation: Iterable[Any],
    *,
    methods: Sequence[Method] = (NuSAM, SAM),
    rhos: Sequence[float] | None = None,
    steps: int = 200,
    delay: float = 0.1,
    warm_up: float = 0.1,
    ascent_share: float | Sequence[float] = 1.0,
    one_pass: bool = False,
    seeds: int = 2,
    confirm: int = 0,
    score: Callable[[nn.Module], float] | None = None,
    report: Callable[[Trial], None] | None = None,
) -> RadiusSearch:
    """Train a copy of the model for a short while with every method and ρ, and see which does best on held-out data.

    A trial takes ``steps`` steps with the learning rate of ``base``, raised linearly over the first ``warm_up`` share
    of them and lowered by a cosine to 0, perturbed after the first ``delay`` share (§5.1.1 of the paper). All trials
    of a seed see the same batches in the same order: the global generators of torch, numpy and Python are seeded for
    each, and so are those that a loader, its sampler, its data set or its transforms hold. All of these, and the model,
    are left as they were found. It costs about
    ``2 · len(methods) · len(rhos) · seeds · steps`` passes, and memory for one more model with its optimizer.

    With ``confirm`` it ends in a verdict. The base optimizer alone is also given as many seconds as each method takes.
    The trial that gains most over the better of the two is trained again on so many new seeds, and so is the base
    optimizer, in as many steps and in as many seconds; ``str(found.verdict)`` says in one sentence what came out.
    That costs ``seeds`` trainings for each method and share and ``3 · confirm`` more, and keeps the weights and the
    optimizer of three trainings in the CPU's memory.

    Read the scores beside the suggestion: neighbouring radii often differ by less than two seeds do, and the best ρ of
    a short training is not always that of a long one. Where several are equally good, take a small one.

    Args:
        model: what is trained, at the weights that training starts from. If it is in training mode, parts that are in
            evaluation mode stay there (a frozen batch norm, say).
        base: makes the base optimizer of a model, such as ``lambda model: torch.optim.AdamW(model.parameters())``.
        loss: ``(model, batch) -> scalar``, the mean loss of a batch.
        loader: batches to train on; it is started over when it ends, and for every training.
        validation: held-out batches.
        methods: classes such as :class:`nusam.NuSAM`, functions, or partials of either, called with
            ``(base_optimizer, rho=, delay=, model=)``, and with ``ascent_share=`` if that is below 1; known by their
            ``__name__``. What takes a ``sigma`` and no ``rho``, as :class:`nusam.RWP` does, gets that.
        rhos: radii that are tried with every method, each positive, and no others. Unless given, 0.0125 to 0.4 by
            factors of 2, and up to six more, half of the smallest or twice the largest, until the best has worse ones
            on both sides.
        steps: of each training.
        delay: share of the steps that the base optimizer takes alone.
        warm_up: share of the steps over which the learning rate rises.
        ascent_share: of each batch, that the ascents see; or several shares, each to be tried. The best ρ is larger
            with a smaller share.
        one_pass: whether each ascent rides in the descent before it, :meth:`nusam.SharpnessAware.one_pass`; for
            methods with a rank-one ball, so that ``methods=(nusam.NuSAM,)`` must be named beside it.
        seeds: trainings of every method and ρ, with batches in another order and, where the model has any, other
            dropout masks.
        confirm: further seeds, for a verdict; at least 2, and 4 or more for an interval that is of use.
        score: judges a trained model, in evaluation mode and without gradients; more is better. The negative mean
            of the loss over the batches of ``validation`` unless given.
        report: told of every trial as it ends; on the new seeds, of the better of the base optimizer's two.

    Raises:
        TypeError, ValueError: if there is no radius, method or batch, a number is out of range, the model, the base
            optimizer or a loader can't serve several trainings, or a method can't wrap it; in one sentence, and but for
            what a loader gives before the first training.
        RuntimeError: under ``torch.inference_mode()``.
    """
    check_network(model)
    check_gradients_can_be_had(model, "find_rho()")
    check_function("base", base, "a model")
    check_function("loss", loss, "a model", "a batch")
    for name, given, takes in (("score", score, "a model"), ("report", report, "a trial")):
        if given is not None:
            check_function(name, given, takes)
    check_batches("loader", loader)
    check_batches("validation", validation)
    check_several("methods", methods)
    methods = list(methods)
    for method in methods:
        check_method("methods", method)
    radii = checked_radii(RHOS if rhos is None else rhos, methods)
    shares = listed(ascent_share)
    if not shares or len(set(shares)) < len(shares):
        raise ValueError(f"ascent_share must be a number or several different ones, got {ascent_share!r}.")
    for share in shares:
        check_share(share)
    check_count("steps", steps, least=1)
    check_count("seeds", seeds, least=1)
    check_count("confirm", confirm)
    if confirm == 1:
        raise ValueError("confirm must be 0 or at least 2, got 1, which has no interval; give 4 or more.")
    for name, part in (("delay", delay), ("warm_up", warm_up)):
        if not isinstance(part, Real) or isinstance(part, bool) or not 0 <= part < 1:
            raise ValueError(f"{name} must be a share of the steps, at least 0 and below 1, got {part!r}.")
    named = {_name(method): method for method in methods}
    if len({ALONE, *named}) <= len(methods):
        twice = Counter([ALONE, *map(_name, methods)]).most_common(1)[0][0]
        raise ValueError(f"Two methods are called {twice}; give one of them a __name__ of its own.")

    def judge(trained: nn.Module) -> float:
        losses = values(trained, loss, validation)
        return -fmean(losses) if all(map(math.isfinite, losses)) else -math.inf

    generators = Generators(loader, validation)
    with generators.put_back(), torch.enable_grad():
        like = None if score else first(validation)
        trainings = Trainings(model, base, loss, loader, steps, delay, warm_up, one_pass, generators, like)
        search = _Search(trainings, named, score or judge, report or (lambda trial: None))
        for method in methods:
            for share in shares:
                trainings.prepared(method, radii[0], share)  # what is refused is refused before anything is trained
        return search.run(radii, shares, range(seeds), range(seeds, seeds + confirm), bracket=rhos is None)


@dataclass(frozen=True)
class _Search:
    trainings: Trainings
    methods: Mapping[str, Method]
    judge: Callable[[nn.Module], float]
    report: Callable[[Trial], None]

    def run(
        self, radii: Sequence[float], shares: Sequence[float], seeds: range, new_seeds: range, bracket: bool
    ) -> RadiusSearch:
        alone = self.trial(ALONE, 0.0, seeds)
        bases, trials = [alone], []
        at_equal_seconds: dict[tuple[str, float], Trial] = {}
        for name in self.methods:
            for share in shares:
                line = [self.trial(name, rho, seeds, share) for rho in radii]
                if bracket:
                    self.extend(line, alone, seeds)
                trials += line
                if new_seeds:
                    steps = self.steps_at_equal_seconds(line, bases)
                    longer = alone if steps == alone.steps else self.trial(ALONE, 0.0, seeds, steps=steps)
                    bases.append(longer)
                    at_equal_seconds[name, share] = longer
        search = RadiusSearch(alone, tuple(trials), at_equal_seconds)
        if not new_seeds:
            return search
        picked = max(search.trials, key=lambda trial: search.gain(trial).mean)
        line = next(line for line in search.lines if picked in line)
        verdict = self.confirm(picked, line, bases, new_seeds, len(search.trials))
        return RadiusSearch(alone, search.trials, at_equal_seconds, verdict)

    def extend(self, line: list[Trial], alone: Trial, seeds: range) -> None:
        """Go on beyond the ends of a line of radii until its best has worse ones on both sides."""
        for _ in range(FURTHER):
            best = _best(line)
            below, above = _open(best, line)
            diverged = not math.isfinite(best.score)
            if not (below or above) or (diverged and not math.isfinite(alone.score)):
                return
            rho = line[0].rho / 2 if below else line[-1].rho * 2
            line.insert(0 if below else len(line), self.trial(best.method, rho, seeds, best.ascent_share))

    def steps_at_equal_seconds(self, line: Sequence[Trial], bases: Sequence[Trial]) -> int:
        """Of the base optimizer; a method is never cheaper than that but by the clock's noise."""
        return max(self.trainings.steps, math.ceil(self.trainings.steps * _price(line, bases)))

    def confirm(
        self, picked: Trial, line: Sequence[Trial], bases: Sequence[Trial], seeds: range, tried: int
    ) -> Verdict:
        kept: dict[tuple[str, int], tuple[float, tuple[dict[str, Any], dict[str, Any]]]] = {}
        sizes = set()

        def keep(trial: tuple[str, int], trained: Trained, score: float) -> None:
            sizes.add((trial, trained.size()))
            if trial not in kept or score > kept[trial][0]:
                kept[trial] = score, trained.states()

        trial = self.trial(picked.method, picked.rho, seeds, picked.ascent_share, keep=keep)
        self.report(trial)
        # More steps can also do harm, as where training overfits: that is no gain of the method.
        both = sorted({picked.steps, self.steps_at_equal_seconds(line, bases)})
        base = _best([self.trial(ALONE, 0.0, seeds, steps=steps, keep=keep) for steps in both])
        self.report(base)
        alike = len(sizes) == len(kept) and len(set(trial.scores)) == len(set(base.scores)) == 1
        helps = not alike and gain_over(trial, base).helps
        taken = trial if helps else base
        weights, state = kept[taken.method, taken.steps][1]
        below, above = _open(picked, line)
        return Verdict(
            trial,
            base,
            price=max(1.0, _price(line, bases)),
            tried=tried,
            beyond=line[0].rho / 2 if below else line[-1].rho * 2 if above else None,
            alike=alike,
            weights=weights,
            optimizer_state=state,
            wrap=self.trainings.wrap(self.methods[picked.method], picked.rho, picked.ascent_share),
        )

    def trial(
        self,
        name: str,
        rho: float,
        seeds: range,
        share: float = 1.0,
        steps: int = 0,
        keep: Callable[[tuple[str, int], Trained, float], None] | None = None,
    ) -> Trial:
        scores, seconds = [], []
        steps = steps or self.trainings.steps
        for seed in seeds:
            trained = self.trainings.run(self.methods.get(name), rho, share, seed, steps)
            with torch.no_grad():
                found = _number(self.judge(trained.model.eval()))
            scores.append(found if math.isfinite(found) else -math.inf)
            seconds.append(trained.seconds)
            if keep:
                keep((name, steps), trained, scores[-1])
        tried = Trial(name, rho, tuple(scores), share, steps, tuple(seconds))
        if not keep:
            self.report(tried)
        return tried


def _number(score: Any) -> float:
    """What a score came to."""
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score must return a number, got {score!r}.") from error


def _best(trials: Iterable[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.score)


def _open(best: Trial, trials: Iterable[Trial]) -> tuple[bool, bool]:
    """Whether no smaller, and whether no larger ρ of its method and share was tried that did worse."""
    worse = [
        trial.rho
        for trial in trials
        if (trial.method, trial.ascent_share) == (best.method, best.ascent_share) and trial.score < best.score
    ]
    return not any(rho < best.rho for rho in worse), not any(rho > best.rho for rho in worse)


def _price(line: Sequence[Trial], bases: Sequence[Trial]) -> float:
    alone = per_step(bases)
    return per_step(line) / alone if alone > 0 else 1.0


def _name(method: Method) -> str:
    while isinstance(method, partial) and "__name__" not in method.__dict__:
        method = method.func
    return getattr(method, "__name__", type(method).__name__)
