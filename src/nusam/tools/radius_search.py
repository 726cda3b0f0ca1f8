"""Which ρ to take: short trainings of copies of a model, one for every method and radius."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nusam.guards.checks import check_base_optimizer, check_count, check_radius, check_share
from nusam.methods import SAM, NuSAM
from nusam.optimizer import SharpnessAware

__all__ = ["RadiusSearch", "Trial", "find_rho"]

Method = Callable[..., SharpnessAware]
RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Trial:
    """One method with one radius; the base optimizer alone has ρ = 0."""

    method: str
    rho: float
    scores: tuple[float, ...]
    """By seed; −∞ for a training that ended in a loss that is not finite."""

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return fmean(self.scores)


@dataclass(frozen=True)
class RadiusSearch:
    """What :func:`find_rho` found."""

    base: Trial
    """The base optimizer alone."""
    trials: tuple[Trial, ...]
    """By method, then by ρ."""

    def suggestion(self, method: str) -> Trial:
        """The trial with the best mean score; of equal ones, the smallest ρ."""
        return max((trial for trial in self.trials if trial.method == method), key=lambda trial: trial.score)

    @property
    def suggestions(self) -> dict[str, float]:
        """ρ by method; 0 where every radius did worse than the base optimizer alone."""
        best = {trial.method: self.suggestion(trial.method) for trial in self.trials}
        return {method: trial.rho if trial.score > self.base.score else 0.0 for method, trial in best.items()}


def find_rho(
    model: nn.Module,
    base: Callable[[nn.Module], Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Any],
    validation: Iterable[Any],
    *,
    methods: Sequence[Method] = (NuSAM, SAM),
    rhos: Sequence[float] = RHOS,
    steps: int = 200,
    delay: float = 0.1,
    warm_up: float = 0.1,
    ascent_share: float = 1.0,
    one_pass: bool = False,
    seeds: int = 2,
    score: Callable[[nn.Module], float] | None = None,
    report: Callable[[Trial], None] | None = None,
) -> RadiusSearch:
    """Train a copy of the model for a short while with every method and ρ, and see which does best on held-out data.

    A trial takes ``steps`` steps with the learning rate of ``base``, raised linearly over the first ``warm_up`` share
    of them and lowered by a cosine to 0, perturbed after the first ``delay`` share (§5.1.1 of the paper). All trials
    of a seed see the same batches in the same order, if the loader shuffles by torch's global generator. The model,
    and the global generator of the CPU, are left as they were found. It costs about
    ``2 · len(methods) · len(rhos) · seeds · steps`` passes, and memory for one more model with its optimizer.

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
            ``__name__``.
        rhos: radii that are tried with every method, each positive.
        steps: of each training.
        delay: share of the steps that the base optimizer takes alone.
        warm_up: share of the steps over which the learning rate rises.
        ascent_share: of each batch, that the ascents see; the best ρ is larger with a smaller share.
        one_pass: whether each ascent rides in the descent before it, :meth:`nusam.SharpnessAware.one_pass`; for
            methods with a rank-one ball.
        seeds: trainings of every method and ρ, with batches in another order and, where the model has any, other
            dropout masks.
        score: judges a trained model, in evaluation mode and without gradients; more is better. The negative mean
            of the loss over the batches of ``validation`` unless given.
        report: told of every trial as it ends.

    Raises:
        TypeError, ValueError: if there is no radius, method or batch, a number is out of range, the base optimizer or a
            loader can't serve several trainings, or a method can't wrap it; in one sentence, and but for a loader
            without batches before the first training.
    """
    rhos = list(rhos)
    if not methods or not rhos:
        raise ValueError("find_rho needs at least one method and one rho, got none; name some.")
    for rho in rhos:
        check_radius(rho)
        if rho == 0:
            raise ValueError("rhos must be positive, got 0; the base optimizer alone is tried in any case.")
    rhos = sorted(map(float, rhos))
    check_share(ascent_share)
    check_count("steps", steps, least=1)
    check_count("seeds", seeds, least=1)
    for name, share in (("delay", delay), ("warm_up", warm_up)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be a share of the steps, at least 0 and below 1, got {share!r}.")
    for name, batches in (("loader", loader), ("validation", validation)):
        if isinstance(batches, Iterator):
            raise TypeError(
                f"{name} must give the same batches to every training, got a {type(batches).__name__}, which can be "
                "run through once; hand over a DataLoader or a list."
            )
    named = {_name(method): method for method in methods}
    if len(named) < len(methods):
        twice = Counter(map(_name, methods)).most_common(1)[0][0]
        raise ValueError(f"Two methods are called {twice}; give one of them a __name__ of its own.")

    def prepared(method: Method | None, rho: float) -> tuple[nn.Module, Optimizer]:
        trained = copy.deepcopy(model)
        if not model.training:
            trained.train()
        optimizer = base(trained)
        check_base_optimizer(optimizer)
        if method is not None:
            options = {} if ascent_share == 1 else {"ascent_share": ascent_share}
            optimizer = method(optimizer, rho=rho, delay=int(delay * steps), model=trained, **options)
            if one_pass:
                optimizer._begin_one_pass()
        return trained, optimizer

    def judge(trained: nn.Module) -> float:
        return -fmean(_values(trained, loss, validation))

    def training(method: Method | None, rho: float, seed: int) -> float:
        trained, optimizer = prepared(method, rho)
        torch.manual_seed(seed)
        batches = _repeated(loader, steps)
        taken = _in_one_pass if one_pass and method is not None else _step_by_step
        _train(optimizer, taken(trained, optimizer, loss, batches), max(1, int(warm_up * steps)), steps)
        with torch.no_grad():
            found = (score or judge)(trained.eval())
        return found if math.isfinite(found) else -math.inf

    def trial(name: str, method: Method | None, rho: float) -> Trial:
        tried = Trial(name, rho, tuple(training(method, rho, seed) for seed in range(seeds)))
        if report:
            report(tried)
        return tried

    with torch.random.fork_rng(devices=[]):
        for method in methods:
            prepared(method, rhos[0])  # what is refused is refused before anything is trained
        alone = trial("base optimizer", None, 0.0)
        return RadiusSearch(alone, tuple(trial(name, method, rho) for name, method in named.items() for rho in rhos))


def _name(method: Method) -> str:
    while isinstance(method, partial) and "__name__" not in method.__dict__:
        method = method.func
    return getattr(method, "__name__", type(method).__name__)


def _train(optimizer: Optimizer, gradients: Iterator[None], warm_up: int, steps: int) -> None:
    def rate(step: int) -> float:
        rest = (step - warm_up) / max(1, steps - warm_up)
        return (step + 1) / (warm_up + 1) if step < warm_up else (1 + math.cos(math.pi * rest)) / 2

    schedule = LambdaLR(optimizer, rate)
    for _ in gradients:
        optimizer.step()
        schedule.step()


def _step_by_step(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module, Any], Tensor], batches: Iterator[Any]
) -> Iterator[None]:
    for batch in batches:
        optimizer.zero_grad()
        for part in optimizer.passes(batch) if isinstance(optimizer, SharpnessAware) else (batch,):
            loss(model, part).backward()  # type: ignore[no-untyped-call]
        yield


def _in_one_pass(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module, Any], Tensor], batches: Iterator[Any]
) -> Iterator[None]:
    assert isinstance(optimizer, SharpnessAware)
    for _ in optimizer.one_pass(batches, partial(loss, model)):
        yield


def _repeated(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """So many batches."""
    while count:
        before = count
        for batch in loader:
            yield batch
            count -= 1
            if not count:
                return
        if count == before:
            raise ValueError("The loader gave no batch; hand over one that can be run through several times.")


def _values(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> list[float]:
    values = [float(loss(model, batch)) for batch in batches]
    if not values:
        raise ValueError("validation gave no batch; hand over one that can be run through several times.")
    return values
