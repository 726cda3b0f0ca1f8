"""νSAM, νSAM-Norm, SAM and SAM-ON by hand, in plain torch: dense ε, copies of the weights. Nothing is the library's."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROUNDING = 1e-15
DOUBTFUL = 1e-11  # from which share of an error in ε on two ways of rounding are no fault of either


class Oracle:
    """A training run of its own: model, base optimizer, warm starts.

    Args:
        model: a copy that nobody else moves.
        base: its optimizer, whose groups have a radius each.
        method: "NuSAM", "NuSAMNorm", "SAM" or "SAMON".
        iterations: T of Algorithm 2.
        guarded: whether buffers move once a step and generators are replayed.
    """

    def __init__(self, model: nn.Module, base: Optimizer, method: str, iterations: int, guarded: bool) -> None:
        self.model, self.base, self.method = model, base, method
        self.iterations, self.guarded = iterations, guarded
        self.named = dict(model.named_parameters())
        self.names = {p: name for name, p in self.named.items()}
        self.norms = {p for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
        self.u: dict[str, Tensor] = {}
        self.steps = 0
        self.delay = 0
        self.schedule: Callable[[int], float] = lambda k: 1.0
        self.excluded: set[str] = set()
        self.epsilon: dict[str, float] = {}  # ‖ε‖ of the last ascent
        self.sigma: dict[str, float] = {}
        self.reached: set[str] = set()  # in the last descent
        self.doubt = 0.0  # how large an error of ε rounding explains
        self.restarted: dict[str, Tensor] = {}  # gradients that missed their u in the last ascent
        self.advanced = False  # whether the last ascent was complete

    # ------------------------------------------------------------ the passes

    def radii(self) -> dict[str, float]:
        """What is perturbed now, and by how much; negative where the base climbs."""
        factor = self.schedule(self.steps)
        signs = {id(group): -1 if group.get("maximize") else 1 for group in self.base.param_groups}
        radii = {name: group["rho"] * factor * signs[id(group)] for name, group in self.targets()}
        return {name: rho for name, rho in radii.items() if rho}

    def targets(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What is perturbed if its group's radius is positive."""
        for group in self.base.param_groups:
            for p in group["params"]:
                chosen = p in self.norms if self.method == "SAMON" else self.method == "SAM" or p.ndim == 2
                if p.requires_grad and chosen and self.names[p] not in self.excluded:
                    yield self.names[p], group

    def is_active(self) -> bool:
        rhos = [group["rho"] for group in self.base.param_groups]
        return self.steps >= self.delay and self.schedule(self.steps) * max(rhos) > 0

    def passes(
        self, run: Callable[[nn.Module, str], Tensor], accumulate: bool = False, without: frozenset[str] = frozenset()
    ) -> Tensor:
        """The loss of the first pass. ``without``: matrices that have no ε in this step."""
        parameters = [p for group in self.base.param_groups for p in group["params"]]
        self.doubt, self.restarted, self.advanced = 0.0, {}, False
        if not self.is_active():
            if not accumulate:
                self._clear(parameters)
            loss = run(self.model, "descent")
            self.reached = self._with_gradients()
            return loss
        kept = [p.grad if accumulate else None for p in parameters]
        self._clear(parameters)
        started, drawn = _Kept(self.model), _generators()
        versions = {name: p._version for name, p in self.named.items()}
        try:
            loss = run(self.model, "ascent")
            epsilon = self._perturbation(without)
        finally:
            for p, gradient in zip(parameters, kept, strict=True):
                p.grad = gradient
        self.advanced = True
        moved = _Kept(self.model)
        # one that neither ε nor the ascent has written is written for the first time in the descent, and may keep that
        restored = epsilon.keys() | {name for name, p in self.named.items() if p._version != versions[name]}
        weights = [(self.named[name], self.named[name].detach().clone()) for name in restored]
        if self.guarded:
            started.restore()
            _replay(drawn)
        try:
            with torch.no_grad():
                for name, e in epsilon.items():
                    self.named[name].add_(e)
            run(self.model, "descent")
        finally:
            with torch.no_grad():
                for p, w in weights:
                    p.copy_(w)
            if self.guarded:
                moved.restore()
        self.reached = self._with_gradients()
        return loss

    def update(self) -> None:
        self.base.step()
        self.steps += 1

    def _with_gradients(self) -> set[str]:
        return {name for name, p in self.named.items() if p.grad is not None}

    @staticmethod
    def _clear(parameters: list[Tensor]) -> None:
        for p in parameters:
            p.grad = None

    # ------------------------------------------------------------ the balls

    def _perturbation(self, without: frozenset[str]) -> dict[str, Tensor]:
        radii = self.radii()
        gradients = {name: self.named[name].grad for name in radii}
        found = {name: g.detach().clone() for name, g in gradients.items() if g is not None}
        self.epsilon, self.sigma = {}, {}
        everything = [p.grad for p in self.named.values() if p.grad is not None]
        finite = [float(g.abs().max()) for g in everything if g.isfinite().all()]
        noise = ROUNDING * max(finite, default=0.0)
        if self.method in ("SAM", "SAMON"):
            return self._euclidean(found, radii, noise)
        pairs = {}
        for name, G in found.items():
            pair = self._top_pair(name, G, noise) if name not in without else None
            if pair is not None:
                pairs[name] = pair
            elif name not in without:
                self.epsilon[name], self.sigma[name] = 0.0, 0.0
        total = sum(sigma**2 for _, _, sigma in pairs.values()) ** 0.5
        epsilon = {}
        for name, (u, v, sigma) in pairs.items():
            share = sigma / total if self.method == "NuSAMNorm" else 1.0
            epsilon[name] = radii[name] * share * torch.outer(u, v)
            self.epsilon[name], self.sigma[name] = abs(radii[name]) * share, sigma
            self.u[name] = u
        return epsilon

    def _euclidean(self, found: dict[str, Tensor], radii: dict[str, float], noise: float) -> dict[str, Tensor]:
        total = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        if not (0 < total < float("inf")):
            self.epsilon = dict.fromkeys(found, 0.0)
            return {}
        self.doubt = noise / total
        self.epsilon = {name: abs(radii[name]) * float(g.norm()) / total for name, g in found.items()}
        return {name: radii[name] * g / total for name, g in found.items()}

    def _top_pair(self, name: str, G: Tensor, noise: float) -> tuple[Tensor, Tensor, float] | None:
        """Algorithm 2 from what is remembered; None if there is nothing to iterate on."""
        if not G.isfinite().all():
            return None
        if not G.any():
            return None
        u = self.u[name]
        sigma = 0.0
        for _ in range(self.iterations):
            v = G.T @ u
            if not v.any():  # u lives on other rows: anew from the gradient itself
                self.restarted[name] = G
                v = G.T @ _irregular(len(u))
                if not v.any():  # nor does that: rounding decides whether anything is there
                    self.doubt = 1.0
                    return None
            self.doubt = max(self.doubt, noise / float(v.norm()) if v.any() else 1.0)
            v = v / v.norm()
            u = G @ v
            sigma = float(u.norm())
            self.doubt = max(self.doubt, noise / sigma if sigma else 1.0)
            u = u / sigma
        return u, v, sigma


def _irregular(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


class _Kept:
    """Buffers, and the numbers beside them."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(b, b.clone()) for b in model.buffers()]
        self._numbers: list[tuple[Any, int]] = [(m, m.calls) for m in model.modules() if hasattr(m, "calls")]

    def restore(self) -> None:
        with torch.no_grad():
            for b, value in self._buffers:
                b.copy_(value)
        for module, calls in self._numbers:
            module.calls = calls


def _generators() -> tuple[Any, Tensor]:
    return random.getstate(), torch.get_rng_state()


def _replay(states: tuple[Any, Tensor]) -> None:
    random.setstate(states[0])
    torch.set_rng_state(states[1])
