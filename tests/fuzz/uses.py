"""What a pass does with a model: a program that the library and the oracle run alike."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.fuzz.trees import SAMPLES, TOKENS, Net, Residual, Spec, kinds, matrices

Extra = tuple[str, int]


class Boom(Exception):
    """What a loop raises by itself."""


@dataclass(frozen=True)
class Plan:
    """A step's program.

    ``extras`` are further uses, each with the index of the matrix that it concerns. ``off`` leaves residual blocks
    out: in which pass ("" is both), and the block's index.
    """

    forwards: int = 1
    separate: bool = False  # a backward for each forward
    extras: tuple[Extra, ...] = ()
    off: tuple[tuple[str, int], ...] = ()

    def beside(self, *extras: Extra) -> "Plan":
        return replace(self, extras=(*self.extras, *extras))

    @property
    def names(self) -> set[str]:
        return {kind for kind, _ in self.extras}

    def touched(self, model: nn.Module) -> set[str]:
        """Matrices whose weights are used otherwise than by calling their layers."""
        known = matrices(model)
        if self.names & ALL_MATRICES:
            return set(known)
        return {known[i % len(known)] for kind, i in self.extras if kind in ONE_MATRIX}


ONE_MATRIX = {"penalty", "outside", "row", "asks", "svd"}
ALL_MATRICES = {"adapted", "slope penalty", "asks all", "again", "backward inputs"}
SECOND = {"adversary", "slope penalty", "asks", "asks all", "asks idle", "backward inputs"}  # autograd.grad in the loss
OTHERS = {"pseudo-labels", "checkpoint", "reentrant", "clears", "scaled features", "chance", "none", "list"}
STRANGE = {"zero", "infinite"}
EXTRAS = sorted(ONE_MATRIX | ALL_MATRICES | SECOND | OTHERS)

extras = st.tuples(st.sampled_from(EXTRAS), st.integers(0, 9))
plans = st.builds(
    Plan,
    forwards=st.sampled_from([1, 1, 1, 2]),
    separate=st.booleans(),
    extras=st.lists(extras, max_size=2).map(tuple),
    off=st.lists(st.tuples(st.just(""), st.integers(0, 3)), max_size=1).map(tuple),
)


def can_run(plan: Plan, spec: Spec) -> bool:
    """Whether torch itself runs such a program, and to the same end each time."""
    checkpoints = kinds(spec) & {"checkpoint", "reentrant"} or plan.names & {"checkpoint", "reentrant"}
    reentrant = "reentrant" in kinds(spec) or "reentrant" in plan.names
    if reentrant and plan.names & (SECOND | {"again"}):
        return False  # torch refuses it
    if checkpoints and plan.names & {"adapted", "slope penalty", "again"}:
        return False  # what is computed anew finds other weights
    written = "clamped" in kinds(spec) or spec.table == "normed"
    if written and (plan.forwards > 1 or checkpoints or plan.names & {"adversary", "adapted", "pseudo-labels", "row"}):
        return False  # a weight that is written after it was used
    if written and plan.names & (ONE_MATRIX | {"slope penalty", "asks all", "asks idle", "again"}):
        return False
    return not ("attention" in kinds(spec) and "slope penalty" in plan.names)  # no second derivative


@lru_cache(maxsize=512)
def sample(width: int, classes: int, at: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(at)
    x = 0.5 + 0.7 * torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, TOKENS, (SAMPLES,), generator=generator)
    return x, tokens, torch.rand(SAMPLES, classes, generator=generator, dtype=torch.float64) - 0.3


def judged(y: Tensor, target: Tensor) -> Tensor:
    return (torch.tanh(y) - target).square().mean() + 0.05 * y.mean()


def run(model: Net, spec: Spec, plan: Plan, at: int, name: str, fails: str = "") -> Tensor:
    """One pass, in which "before", "between", "inside" or "after" says where it fails."""
    _leave_out(model, plan, name)
    if fails == "before":
        raise Boom
    if "clears" in plan.names:
        model.zero_grad()
    losses = [_loss(model, spec, plan if k == 0 else Plan(), at + 100_000 * k) for k in range(plan.forwards)]
    if fails == "inside":
        losses[-1].register_hook(_fail)
    if fails == "between":
        raise Boom
    first = sum(loss.detach() for loss in losses)
    if plan.separate:
        for loss in losses:
            loss.backward()
    elif "list" in plan.names:
        torch.autograd.backward(losses)
    elif "backward inputs" in plan.names:
        torch.stack(losses).sum().backward(inputs=[p for p in model.parameters() if p.requires_grad])
    elif "again" in plan.names:
        total = torch.stack(losses).sum()
        total.backward(retain_graph=True)
        (0.5 * total).backward()
    else:
        torch.stack(losses).sum().backward()
    if fails == "after":
        raise Boom
    return first


def _fail(_: Tensor) -> None:
    raise Boom


def _leave_out(model: Net, plan: Plan, name: str) -> None:
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    left_out = {k % len(blocks) for when, k in plan.off if when in ("", name)} if blocks else set()
    for k, block in enumerate(blocks):
        block.off = k in left_out


def _loss(model: Net, spec: Spec, plan: Plan, at: int) -> Tensor:
    classes = TOKENS if spec.table == "tied" else spec.classes
    x, tokens, target = sample(spec.width, classes, at)
    names = plan.names
    if "chance" in names:
        x = x + 0.2 * random.random() + 0.1 * torch.rand((), dtype=x.dtype)
    if "pseudo-labels" in names:
        with torch.no_grad():
            target = 0.5 * target + 0.5 * torch.tanh(model(x, tokens))
    if "adversary" in names:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(judged(model(x, tokens), target), x, allow_unused=True)
        x = x.detach() + (0 if slope is None else 0.5 * slope)
    if "slope penalty" in names:
        x = x.clone().requires_grad_()
    if names & {"checkpoint", "reentrant"}:
        x = x.clone().requires_grad_()
        y = checkpoint(model, x, tokens, use_reentrant="reentrant" in names)
    else:
        y = model(x, tokens)
    if "scaled features" in names and y.requires_grad:
        y.register_hook(lambda g: 0.7 * g)
    loss = judged(y, target)
    if "slope penalty" in names:
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + 0.5 * slope.square().sum()
    return _beside(model, plan, loss, x, tokens, target)


def _beside(model: Net, plan: Plan, loss: Tensor, x: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
    known = matrices(model)
    for kind, i in plan.extras:
        W = model.get_parameter(known[i % len(known)])
        if kind == "penalty":
            loss = loss + 0.1 * W.square().sum()
        elif kind == "outside":
            features = torch.linspace(-1, 1, 2 * W.shape[1], dtype=x.dtype).reshape(2, -1)
            loss = loss + 0.2 * torch.tanh(F.linear(features, W)).sum()
        elif kind == "row":
            loss = loss + 0.3 * torch.sin(W[i % len(W)]).sum()
        elif kind == "svd":
            loss = loss + 0.1 * torch.linalg.vector_norm(W @ W.T)
        elif kind == "asks":
            loss = _asks(loss, [W])
        elif kind == "asks all":
            loss = _asks(loss, list(model.parameters()))
        elif kind == "asks idle":
            vectors = [p for p in model.parameters() if p.ndim == 1]
            loss = _asks(loss, [vectors[i % len(vectors)]])
        elif kind == "adapted":
            mask = {name: p * (1 - 0.1 * (i % 3)) for name, p in model.named_parameters() if i % 2 or p.ndim == 2}
            loss = loss + judged(functional_call(model, mask, (x, tokens)), target)
        elif kind == "zero":
            loss = 0.0 * loss
        elif kind == "infinite":
            loss = float("inf") * loss
    return loss


def _asks(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return loss
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    total = sum(float(g.square().sum()) for g in found if g is not None)
    return loss * (1 + 1 / (1 + total))
