"""Runs loops with the library and holds every step to the oracle."""

import functools
import linecache
import math
import random
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import nusam
from tests.loops.loop import Loop, stepped
from tests.loops.oracle import Oracle

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "matrix-free": {"ascent": "matrix-free"},
    "forward": {"placement": "forward"},
    "gradient": {"ascent": "gradient"},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
LEFT_BY_ITERATIONS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
PassedOver = frozenset[tuple[int, str]]
PACKAGE = Path(nusam.__file__).parent


class Library:
    """The optimizer under test, driven as its documentation says."""

    def __init__(self, base: Optimizer, model: nn.Module, rho: float, **options: Any) -> None:
        self.base, self.model = base, model
        self.make = functools.partial(nusam.NuSAM, rho=rho, model=model, **options)
        self.opt = self.make(base)
        self.gradients: list[dict[str, Tensor]] = []
        self.reported: dict[str, float] = {}
        self.fallbacks: set[str] = set()

    def passes(self, backward: Callable[[], None], accumulate: bool = False) -> None:
        for _ in self.opt.passes(accumulate=accumulate):
            backward()
        self._note()

    def halves(self, backward: Callable[[], None]) -> None:
        with self.opt.ascent():
            backward()
        with self.opt.descent():
            backward()
        self._note()

    def closure(self, backward: Callable[[], None]) -> None:
        self.opt.step(backward)
        self._note()

    def update(self, scaler: torch.amp.GradScaler | None = None) -> None:
        stepped(self.opt, scaler)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.opt.add_param_group(group)

    def resume(self, base: Optimizer) -> None:
        saved = self.opt.state_dict()
        self.base, self.opt = base, self.make(base)
        self.opt.load_state_dict(saved)

    def moved(self, name: str) -> bool:
        """Whether the last descent reached a parameter."""
        gradient = self.gradients[-1].get(name)
        return gradient is not None and bool(gradient.any())

    def _note(self) -> None:
        held = {id(p) for group in self.base.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None and id(p) in held})
        metrics = self.opt.metrics()
        self.reported = {k.removeprefix("epsilon/"): v for k, v in metrics.items() if k.startswith("epsilon/")}
        self.fallbacks = {k.removeprefix("fallback/") for k in metrics if k.startswith("fallback/")}


@dataclass
class Outcome:
    """What became of a loop."""

    verdict: str  # "right", "refused" or "WRONG"
    said: tuple[str, ...] = ()  # the sentence that refuses, what is wrong, or what was warned of
    fallbacks: set[str] = field(default_factory=set)  # in the last step: whose gradient was formed
    perturbed: set[str] = field(default_factory=set)  # and what had an ε


@dataclass
class Snapshot:
    """What a step leaves behind."""

    tensors: dict[str, Tensor]
    epsilon: dict[str, float]
    generators: tuple[Any, ...]


def seeded(step: int) -> None:
    torch.default_generator.manual_seed(step)  # torch.manual_seed takes longer than a step
    random.seed(step)
    np.random.seed(step)


def generators() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), float(torch.rand(()))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in state.items()}


@functools.cache
def by_hand(case: type[Loop], without: PassedOver = frozenset()) -> tuple[list[Snapshot], float, set[str]]:
    """Every step of the oracle in float64, the largest σ₂/σ₁, and what torch warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loop = case(torch.float64, lambda base, model: Oracle(base, model, case.rho, case.frozen, without))
        found = []
        for step in range(case.steps):
            seeded(step)
            for driver in loop.drivers:
                driver.step = step
            loop.step(step)
            epsilon = {name: rho for driver in loop.drivers for name, rho in driver.epsilon.items()}
            found.append(Snapshot(tensors(loop.model), epsilon, generators()))
    return found, max(driver.ratio for driver in loop.drivers), {str(w.message) for w in warned}


def iterations(ratio: float, dtype: torch.dtype) -> int:
    """How many of Algorithm 2 find what an SVD finds, if no σ₂/σ₁ is larger."""
    return 2 + math.ceil(math.log(LEFT_BY_ITERATIONS[dtype]) / math.log(max(ratio, 1e-3)) / 2)


def outcome(case: type[Loop], mode: str, dtype: torch.dtype) -> Outcome:
    """What the library makes of a loop."""
    _, ratio, known = by_hand(case)
    options = {**MODES[mode], **case.options}
    if case.frozen:
        options["targets"] = "frozen"
    options["power_iterations"] = iterations(ratio, dtype)
    loop: Loop | None = None
    before: dict[str, Tensor] = {}
    step = -1
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            loop = case(dtype, lambda base, model: Library(base, model, case.rho, **options))
            twin = None
            if dtype == torch.bfloat16:
                twin = case(torch.float64, lambda base, model: Oracle(base, model, case.rho, case.frozen))
            without: set[tuple[int, str]] = set()
            heard = 0
            for step in range(case.steps):
                before = tensors(loop.model)
                seeded(step)
                if twin:
                    twin.model.load_state_dict(loop.model.state_dict())
                loop.step(step)
                if case.halves:
                    without |= {(step, name) for w in warned[heard:] for name in passed_over(str(w.message))}
                heard = len(warned)
                fault = compared_in_gradients(loop, twin, step, without) if twin else differ(loop, step, without)
                if fault:
                    return Outcome("WRONG", (f"step {step}: {fault}",))
        except Exception as error:
            return refusal(error, step, loop, before)
    said = tuple(sorted({str(w.message) for w in warned} - known))
    perturbed = {name for driver in loop.drivers for name, e in driver.reported.items() if e > 0}
    fallbacks = {f.split(": ")[0] for driver in loop.drivers for f in driver.fallbacks}
    return Outcome("right", said, fallbacks, perturbed)


def passed_over(sentence: str) -> list[str]:
    """The matrices that a warning says were not perturbed in the step that it comes from."""
    names = re.match(r"([\w.]+(?:, [\w.]+)*) (?:was|were) .*not perturbed in this step", sentence)
    return names[1].split(", ") if names else []


def differ(loop: Loop, step: int, without: set[tuple[int, str]]) -> str:
    """How a step's result differs from the oracle's, if it does."""
    after = generators()
    expected = by_hand(type(loop), frozenset(without))[0][step]
    for name, value in tensors(loop.model).items():
        wanted = expected.tensors[name]
        tolerance = TOLERANCE[loop.dtype]
        if not torch.allclose(value.double(), wanted.double(), rtol=tolerance, atol=tolerance):
            return f"{name} is off by {float((value.double() - wanted.double()).abs().max()):.1e}"
    reported = {name: e for driver in loop.drivers for name, e in driver.reported.items() if e > 0}
    for name in expected.epsilon.keys() | reported.keys():
        said, had = reported.get(name, 0.0), expected.epsilon.get(name, 0.0)
        unreached = said == 0 and all(not driver.moved(name) for driver in loop.drivers)
        if abs(said - had) > 1e-3 and not unreached:
            return f"metrics() says that ε of {name} is {said:.3g}, and it is {had:.3g}"
    return "" if after == expected.generators else "a generator stands elsewhere"


def compared_in_gradients(loop: Loop, twin: Loop, step: int, without: set[tuple[int, str]]) -> str:
    """The same in a coarse dtype, by the gradients of the step's descents from the same weights."""
    for oracle in twin.drivers:
        oracle.step, oracle.without = step, frozenset(without)
    seeded(step)
    twin.step(step)
    for driver, oracle in zip(loop.drivers, twin.drivers, strict=True):
        if len(driver.gradients) != len(oracle.gradients):
            return f"{len(driver.gradients)} descents, not {len(oracle.gradients)}"
        for found, wanted in zip(driver.gradients, oracle.gradients, strict=True):
            if found.keys() != wanted.keys():
                return f"gradients of {sorted(found.keys() ^ wanted.keys())} are there or not"
            scale = max((float(g.norm()) for g in wanted.values()), default=0.0)
            for name, g in wanted.items():
                off = float((found[name].double() - g).norm())
                if off > TOLERANCE[torch.bfloat16] * max(float(g.norm()), 0.1 * scale) + 1e-6:
                    return f"the gradient of {name} is off by {off / float(g.norm()):.1e}"
        driver.gradients.clear()
        oracle.gradients.clear()
    return ""


def refusal(error: Exception, step: int, loop: Loop | None, before: dict[str, Tensor]) -> Outcome:
    """A sentence of ours that leaves the weights as they were; anything else is wrong."""
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, line = frames[-1]
    path = Path(frame.f_code.co_filename)
    ours = path.is_relative_to(PACKAGE) and linecache.getline(str(path), line).lstrip().startswith("raise")
    where = f"step {step}: {type(error).__name__}: {error} ({path.name}:{line})"
    if not ours or "\n" in str(error) or not str(error).endswith("."):
        return Outcome("WRONG", (where,))
    for name, value in tensors(loop.model).items() if loop and before and len(loop.drivers) == 1 else ():
        old = before.get(name)
        if old is not None and old.is_floating_point():
            ulp = torch.finfo(old.dtype).eps * (old.abs() + loop.rho)
            if not ((value - old).abs() <= ulp).all() and not torch.equal(value, loop.as_it_writes(old)):
                return Outcome("WRONG", (f"after {where} {name} is perturbed",))
    return Outcome("refused", (str(error),))
