"""A loop's step as an engine takes it: by the passes of a perturbation that has no optimizer to wrap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import nusam
from tests.loops.loop import stepped
from tests.loops.running import Library


class NotAnEngines(Exception):
    """The loop calls its optimizer for what is the engine's own business."""


class Engine(Library):
    """The perturbation under test, and a base optimizer that it does not know of."""

    def __init__(self, base: Optimizer, model: nn.Module, rho: float, **options: Any) -> None:
        self.base, self.model = base, model
        self.make = lambda: nusam.Perturbation(model, rho, **options)
        self.opt = self.make()
        self.gradients: list[dict[str, Tensor]] = []
        self.reported: dict[str, float] = {}
        self.fallbacks: set[str] = set()
        if any("rho" in group for group in base.param_groups):
            raise NotAnEngines

    def passes(self, backward: Callable[[], None], accumulate: bool = False) -> None:
        if not accumulate:
            self.base.zero_grad()
        for name in self.opt.passes("ascent", ends_step=False):
            assert name == "ascent"
            backward()
        self._note()

    def halves(self, backward: Callable[[], None]) -> None:
        raise NotAnEngines

    closure = halves

    def update(self, scaler: torch.amp.GradScaler | None = None) -> None:
        stepped(self.base, scaler)

    def add_param_group(self, group: dict[str, Any]) -> None:
        raise NotAnEngines

    def resume(self, base: Optimizer) -> None:
        base.load_state_dict(self.base.state_dict())
        saved = self.opt.state_dict()
        self.base, self.opt = base, self.make()
        self.opt.load_state_dict(saved)
