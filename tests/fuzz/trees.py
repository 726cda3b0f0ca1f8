"""Random trees of modules, of a few units each, which a tuple describes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SAMPLES = 4
TOKENS = 7

Tree = tuple[Any, ...]


@dataclass(frozen=True)
class Spec:
    """A model: x (and a table's rows) → body → head."""

    width: int
    body: Tree
    table: str = ""  # "", "plain", "padded", "normed", or "tied" to the head
    classes: int = 3
    seed: int = 0


class Net(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.table: nn.Embedding | None = None
        if spec.table:
            padding = 0 if spec.table == "padded" else None
            self.table = nn.Embedding(TOKENS, spec.width, padding, max_norm=0.8 if spec.table == "normed" else None)
        self.body = _build(spec.body, spec.width)
        self.head = nn.Linear(spec.width, TOKENS if spec.table == "tied" else spec.classes)
        if spec.table == "tied":
            assert self.table is not None
            self.head.weight = self.table.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.table is not None:
            x = x + self.table(tokens)
        y: Tensor = self.head(self.body(x))
        return y


class Residual(nn.Module):
    """What a step may leave out, if told so."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.off else x + self.inner(x)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.inner(x)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Attention(nn.Module):
    """The samples are a sequence; keys may be others than queries."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.MultiheadAttention(width, 1, batch_first=True, kdim=None if kind != "own" else width, bias=True)
        if kind == "apart":
            self.inner = nn.MultiheadAttention(width, 1, batch_first=True, kdim=width + 1, vdim=width)

    def forward(self, x: Tensor) -> Tensor:
        q = x[None]
        k = q if self.kind == "self" else q.flip(1)
        if self.kind == "apart":
            return x + self.inner(q, F.pad(k, (0, 1), value=1.0), k, need_weights=False)[0][0]
        return x + self.inner(q, k, k, need_weights=False)[0][0]


class Tied(nn.Module):
    """Two layers that share a matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))


class Functional(nn.Module):
    """A layer that is never called, but its weight is; ``how`` says in which way."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(width, width), how

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if self.how == "function":
            return F.linear(x, weight, bias)
        if self.how == "keyword":
            return self.layer(input=x)
        if self.how == "decoder":  # the encoder's weight, transposed
            return F.linear(torch.tanh(self.layer(x)), weight.T)
        return x @ weight.T + bias


class Own(nn.Module):
    """A matrix of a module of one's own, and a buffer that moves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width)
        self.register_buffer("mean", torch.zeros(width))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            with torch.no_grad():
                self.mean.mul_(0.8).add_(x.mean(0), alpha=0.2)
        return torch.tanh((x - self.mean + 0.01 * self.calls) @ self.matrix)


class Clamped(nn.Module):
    """A layer that writes its own weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.35, 0.35)
        return self.layer(x)


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, torch.zeros_like(x))


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, None])[:, 0]


def _build(tree: Tree, width: int) -> nn.Module:
    kind, *rest = tree
    inner = [_build(branch, width) for branch in rest if isinstance(branch, tuple)]
    if kind == "seq":
        return nn.Sequential(*inner)
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, width, bias=rest[0]), nn.Tanh())
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, rest[0]), nn.GELU(), nn.Linear(rest[0], width))
    made = {
        "residual": lambda: Residual(*inner),
        "twice": lambda: Twice(*inner),
        "checkpoint": lambda: Checkpointed(*inner, reentrant=False),
        "reentrant": lambda: Checkpointed(*inner, reentrant=True),
        "attention": lambda: Attention(width, *rest),
        "tied": lambda: Tied(width),
        "function": lambda: Functional(width, *rest),
        "own": lambda: Own(width),
        "clamped": lambda: Clamped(width),
        "cell": lambda: Cell(width),
        "filter": Filter,
        "layer norm": lambda: nn.LayerNorm(width, eps=0.1),
        "batch norm": lambda: nn.BatchNorm1d(width, eps=0.1),
        "dropout": lambda: nn.Dropout(0.3),
    }
    return made[kind]()


def build(spec: Spec) -> Net:
    """The model, in float64; the same weights every time."""
    torch.default_generator.manual_seed(spec.seed)
    return Net(spec).double()


def nodes(tree: Tree) -> Iterator[Tree]:
    yield tree
    for branch in tree[1:]:
        if isinstance(branch, tuple):
            yield from nodes(branch)


def kinds(spec: Spec) -> set[str]:
    return {node[0] for node in nodes(spec.body)}


def matrices(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


_leaves = st.one_of(
    st.tuples(st.just("linear"), st.booleans()),
    st.tuples(st.just("mlp"), st.integers(2, 5)),
    st.tuples(st.sampled_from(["layer norm", "batch norm", "dropout", "tied", "own", "clamped", "cell", "filter"])),
    st.tuples(st.just("attention"), st.sampled_from(["self", "other", "apart"])),
    st.tuples(st.just("function"), st.sampled_from(["function", "keyword", "product", "decoder"])),
    st.tuples(st.just("linear"), st.just(True)),
)


def _nests(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    around = st.sampled_from(["residual", "residual", "twice", "checkpoint", "reentrant"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("seq", *parts)), st.tuples(around, inner)
    )


specs = st.builds(
    Spec,
    width=st.integers(2, 5),
    body=st.recursive(_leaves, _nests, max_leaves=5),
    table=st.sampled_from(["", "", "plain", "padded", "normed", "tied"]),
    classes=st.integers(1, 3),
    seed=st.integers(0, 20),
)
