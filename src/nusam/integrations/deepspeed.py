"""νSAM where accelerate or Trainer run on DeepSpeed, whose engine keeps gradients and the step to itself."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nusam.methods import NuSAM
from nusam.perturbation import Perturbation

__all__ = ["InEngine", "before_the_step", "replaced"]

FILE = "nusam.pt"  # beside an engine's own files in a checkpoint


def before_the_step(
    engine: nn.Module, perturbation: Perturbation, passes: Generator[Any, None, None]
) -> Generator[Any, None, None]:
    """The passes over one micro-batch, after which the engine steps, as ``Accelerator.backward`` asks for in each.

    It steps too if the loop leaves the descent once that has been asked for, as with ``break``.
    """
    asked: list[tuple[Any, Any]] = []
    in_descent = False

    def step(*args: Any, **kwargs: Any) -> None:
        asked.append((args, kwargs))

    try:
        with replaced(engine, "step", step) as own, closing(passes) as parts:
            for part in parts:
                asked.clear()  # in the ascent
                in_descent = perturbation._passes._pass == "descent"
                yield part
    except GeneratorExit:
        for args, kwargs in asked if in_descent else ():
            own(*args, **kwargs)
        raise
    for args, kwargs in asked:
        own(*args, **kwargs)


class InEngine:
    """νSAM's passes in a Trainer under DeepSpeed, and its state in the checkpoints.

    Args:
        method: :class:`nusam.NuSAM`, :class:`nusam.Perturbation`, or a ``functools.partial`` of one, whose arguments
            the perturbation gets.

    Raises:
        NotImplementedError: of any other method, and of arguments that :class:`nusam.Perturbation` has not.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._options: dict[str, Any] = {}
        kind: Any = method
        while isinstance(kind, partial) and not kind.args:
            self._options, kind = {**kind.keywords, **self._options}, kind.func
        if kind not in (NuSAM, Perturbation):
            raise NotImplementedError(
                f"Under DeepSpeed νSAM alone can be had, got {getattr(kind, '__name__', kind)}; hand over "
                "sharpness_aware=nusam.Perturbation, or functools.partial(nusam.Perturbation, rho=0.05)."
            )
        known = signature(Perturbation).parameters
        if unknown := [name for name in self._options if name not in known or name == "model"]:
            raise NotImplementedError(
                f"Under DeepSpeed νSAM has no {unknown[0]}=, since its ascent is matrix-free and ε lives in the "
                "forward; leave it out."
            )
        self._perturbation: Perturbation | None = None
        self._resumes_from: Path | None = None
        self._passed = False

    def begin(self, resumes_from: Path | None) -> None:
        """A training begins, from a checkpoint if one is named."""
        self._perturbation, self._resumes_from = None, resumes_from

    def delay(self, steps: int) -> None:
        """Perturb after so many steps."""
        self._options["delay"] = steps

    def of(self, engine: nn.Module) -> Perturbation:
        """The perturbation of the engine's model, as the checkpoint left it."""
        if self._perturbation is None:
            self._perturbation = Perturbation(engine, **self._options)
            if self._resumes_from is not None and (self._resumes_from / FILE).exists():
                self._perturbation.load_state_dict(torch.load(self._resumes_from / FILE, map_location="cpu"))
        return self._perturbation

    def passes(self, engine: nn.Module, ends_step: bool) -> Generator[str, None, None]:
        """The passes over one micro-batch by name, after which the engine steps."""
        self._passed = True
        return before_the_step(engine, self.of(engine), self.of(engine)._named(ends_step))

    def save(self, checkpoint: Path) -> None:
        """Put the state beside the engine's."""
        if self._perturbation is not None:
            torch.save(self._perturbation.state_dict(), checkpoint / FILE)

    def had_passes(self) -> bool:
        """Whether there were any since this was asked last."""
        passed, self._passed = self._passed, False
        return passed


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let an object have another method; the one that it had."""
    own, before = vars(owner), getattr(owner, name)
    was_own = name in own
    setattr(owner, name, function)
    try:
        yield before
    finally:
        delattr(owner, name)
        if was_own:
            own[name] = before
