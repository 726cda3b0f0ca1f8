"""νSAM by hand: a float64 SVD of every matrix's gradient, copies of the weights. Nothing here is the library's."""

import random
from collections.abc import Callable, Container

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.loops.loop import stepped


class Oracle:
    """A loop's training step as the algorithm means it, however slow.

    Args:
        base: takes the step.
        model: whose buffers, and frozen weights, move once a step, and are in the descent what they were in the ascent.
        rho: the radius of groups that name none.
        frozen: whether the model's frozen matrices are perturbed, in place of the optimizer's.
        without: matrices that are passed over in a step, counted from 0.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        rho: float,
        frozen: bool = False,
        without: frozenset[tuple[int, str]] = frozenset(),
    ) -> None:
        self.base, self.model, self.rho, self.frozen, self.without = base, model, rho, frozen, without
        self.step = 0
        self.epsilon: dict[str, float] = {}  # of the last step
        self.ratio = 0.0  # the largest σ₂/σ₁ of any gradient so far: what a power iteration has to overcome
        self.gradients: list[dict[str, Tensor]] = []  # of every descent

    def passes(self, backward: Callable[[], None], accumulate: bool = False) -> None:
        parameters = [p for group in self.base.param_groups for p in group["params"]]
        before = [p.grad for p in parameters] if accumulate else [None] * len(parameters)
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
        radii = self._targets()
        still = _Still(self.model, radii)
        thawed = [p for p in radii if not p.requires_grad]
        for p in [*parameters, *radii]:
            p.grad = None
        for p in thawed:
            p.requires_grad_(True)
        weights = [(p, p.detach().clone()) for p in self.model.parameters()]
        try:
            backward()
            weights = [(p, p.detach().clone()) for p in self.model.parameters()]  # a forward may have changed them
            epsilon = self._epsilon(radii)
            for p in thawed:
                p.requires_grad_(False)
            moved = _Still(self.model, radii)
            still.restore()
            random.setstate(generators[0])
            np.random.set_state(generators[1])
            torch.set_rng_state(generators[2])
            for p in thawed:
                p.grad = None
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
            with torch.no_grad():
                for p, e in epsilon.items():
                    p.copy_(p + e.to(p.dtype))
            backward()
        finally:
            for p in thawed:
                p.requires_grad_(False)
            with torch.no_grad():
                for p, w in weights:
                    p.copy_(w)
        moved.restore()
        names = {p: name for name, p in self.model.named_parameters()}
        self.gradients.append({names[p]: p.grad.clone() for p in parameters if p.grad is not None and p in names})

    halves = passes

    def closure(self, backward: Callable[[], None]) -> None:
        self.passes(backward)
        self.update()

    def update(self, scaler: torch.amp.GradScaler | None = None) -> None:
        stepped(self.base, scaler)

    def add_param_group(self, group: dict) -> None:
        self.base.add_param_group(group)

    def resume(self, base: Optimizer) -> None:
        base.load_state_dict(self.base.state_dict())
        self.base = base

    def _targets(self) -> dict[Tensor, float]:
        if self.frozen:
            return {p: self.rho for p in self.model.parameters() if not p.requires_grad and p.ndim == 2}
        return {
            p: group.get("rho", self.rho)
            for group in self.base.param_groups
            for p in group["params"]
            if p.requires_grad and p.ndim == 2
        }

    def _epsilon(self, radii: dict[Tensor, float]) -> dict[Tensor, Tensor]:
        names = {p: name for name, p in self.model.named_parameters()}
        epsilon: dict[Tensor, Tensor] = {}
        self.epsilon = {}
        for p, rho in radii.items():
            name = names.get(p, "?")
            G = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            if not G.any() or not G.isfinite().all() or (self.step, name) in self.without:
                continue
            U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
            epsilon[p] = rho * torch.outer(U[:, 0], Vh[0])
            self.epsilon[name] = rho
            if len(S) > 1:
                self.ratio = max(self.ratio, float(S[1] / S[0]))
        return epsilon


class _Still:
    """What a model holds that no optimizer moves."""

    def __init__(self, model: nn.Module, perturbed: Container[Tensor]) -> None:
        self._kept = [
            (tensors, name, tensor, tensor.detach().clone())
            for module in model.modules()
            for tensors in (module._buffers, module._parameters)
            for name, tensor in tensors.items()
            if tensor is not None and not tensor.requires_grad and tensor not in perturbed
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for tensors, name, tensor, value in self._kept:
                tensors[name] = tensor
                tensor.copy_(value)
