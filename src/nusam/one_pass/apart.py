"""Layers whose first rows see W + ε and give the gradient, and whose other rows see W and give the next ε's products.

The first rows are this batch's samples. Those behind are the first samples of the next batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.function import as_multiplied, without_autocast
from nusam.ascent.record import Record
from nusam.distributed.blocks import Block, block, is_sharded, layout, local, output_of_blocks
from nusam.layers.convolutions import Convolution
from nusam.layers.kinds import Conv1D, Embedding, Kind, Linear, Own, is_altered, is_foreign, is_plain, tapped
from nusam.layers.reads import untold
from nusam.lmo import RankOne
from nusam.one_pass.copies import Copy, by_copies, suits
from nusam.one_pass.inputs import Inputs
from nusam.one_pass.joint import CannotJoin, Joint
from nusam.placement.in_forward import InForward

__all__ = ["Apart", "Mixed"]


IN_HALF = "computes in float16, where the samples behind would leave nothing"


class Mixed:
    """What a step sees of gradients that reach samples which they should not: zero where samples are independent."""

    def __init__(self, of: str) -> None:
        self.of = of  # whose loss runs backwards: "first" or "second"
        self.found: list[Tensor] = []

    def look(self, D: Tensor, cut: int) -> None:
        """At the gradient of a layer's output rows, of which the first ``cut`` are this batch's."""
        others = D[cut:] if self.of == "first" else D[:cut]
        if others.numel():
            self.found.append(torch.linalg.vector_norm(others.detach().float(), float("inf")))

    def value(self) -> float:
        """The largest; waits for the device."""
        if not self.found:
            return 0.0
        device = self.found[0].device
        return float(torch.stack([x.to(device) for x in self.found]).max())


class Apart:
    """A layer with W + ε for this batch's rows and W for those behind, which give the products of the next ε.

    Args:
        joint: says whose rows a call sees.
        epsilon: this step's, if there is one.
        record: takes the products.
        inputs: remembers which of them all samples share.
    """

    def __init__(self, joint: Joint, epsilon: RankOne | None, record: Record | None, inputs: Inputs) -> None:
        self.joint, self.epsilon, self.record, self.inputs = joint, epsilon, record, inputs
        self.mixed: Mixed | None = None  # looks at the gradients, in a step that checks
        self.copies: Copy | None = None  # of a small matrix, which its layer may multiply with
        self.suits = True  # whether they would have done, where gradients were looked at
        self.late: Callable[[], Record | None] = lambda: None  # the record that is needed where it can't
        self.alone: InForward | None = None  # takes over where no samples travel behind
        self.is_by_itself = False  # whether a side calls the layer without the other one
        self._calls = 0
        # in a compiled graph
        self.added = None if epsilon is None else InForward(epsilon.u, epsilon.v)

    def go_alone(self) -> None:
        """From now on all rows are this batch's."""
        unperturbed = torch.zeros(())
        u, v = (unperturbed, unperturbed) if self.epsilon is None else (self.epsilon.u, self.epsilon.v)
        self.alone = InForward(u, v)

    @property
    def calls(self) -> int:
        """That added ε, outside of compiled graphs."""
        return self._calls if self.alone is None else self.alone.calls

    def __call__(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return self._in_a_graph(kind, x, W, extra, rows)
        if self.alone is not None:
            return self.alone(kind, x, W, extra, rows) if self.epsilon is not None else kind.apply(x, W, extra)
        if self.mixed is not None:
            self.suits &= self._suits(kind, x, W, rows)
        elif self.copies is not None:
            if self._suits(kind, x, self.copies.matrices, rows) and kind is self.copies.kind:
                self._calls += torch._C._current_graph_task_id() == -1  # no recomputation
                return by_copies(self.copies, x, extra)
            self._do_without_copies()
        if kind is Own or is_foreign(W):
            raise CannotJoin("has a quantized layer, whose samples are not told apart")
        if is_sharded(W) or is_sharded(x):
            return self._split(kind, x, W, extra)
        if is_altered(kind) or not is_plain(x):
            raise CannotJoin("has a layer that computes with another function than torch's")
        y: Tensor = untold(self._apart, kind, x, W, extra, rows)
        return y

    def _in_a_graph(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        """By two calls of the layer's function: a graph can't report, and hands out products as a gradient."""
        if self.alone is not None:
            return self.alone(kind, x, W, extra, rows) if self.epsilon is not None else kind.apply(x, W, extra)
        if rows is not None or kind is Own or is_sharded(W):
            raise CannotJoin("has a compiled layer that is not served in a graph")
        side, samples = self.joint.side, sum(self.joint.rows)
        if side == "both" and self._is_shared(kind, x):
            x = x.expand(samples, *x.shape[x.ndim > 1 :])
        self._cut(kind, x)
        length = x.shape[0]
        first = length // samples * self.joint.rows.first if side == "both" else length if side == "first" else 0
        parts = []
        if first:
            mine = x[:first]
            parts.append(kind.apply(mine, W, extra) if self.added is None else self.added(kind, mine, W, extra))
        if first < length:
            others, record = x[first:], self.record
            parts.append(kind.apply(others, W, extra) if record is None else record.use(kind, others, W, extra))
        y = torch.cat(parts)
        if y.dtype == torch.float16:
            raise CannotJoin(IN_HALF)
        return y

    def _suits(self, kind: type[Kind], x: Tensor, W: Tensor, rows: slice | None) -> bool:
        """Whether the matrix's copies would do in this call."""
        joint = self.joint
        if rows is not None or joint.side != "both" or not torch.is_grad_enabled() or is_sharded(W):
            return False
        return suits(kind, x, W.dtype, sum(joint.rows))

    def _do_without_copies(self) -> None:
        """A call is otherwise than those that were looked at."""
        if not torch.is_grad_enabled() and not self._calls:
            self.copies = None  # a re-entrant checkpoint's, which computes again by the same function
        if self.record is None:
            self.record = self.late()
            if self.record is not None:
                self.record.calls = self._calls

    def inner(self, x: Tensor, W: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
        """A linear layer of an attention, whose input (L, N, E) or (L·N, E) has the samples behind the positions."""
        if self.alone is not None or self.joint.side != "both":
            return self(Linear, x, W, bias, rows)
        samples = sum(self.joint.rows)
        if x.ndim == 3:
            return self(Linear, x.transpose(0, 1), W, bias, rows).transpose(0, 1).contiguous()  # it takes views
        if x.shape[0] % samples:
            raise CannotJoin("folds the samples' dimension of an attention's input away")
        y = self(Linear, x.view(-1, samples, x.shape[-1]).transpose(0, 1), W, bias, rows)
        return y.transpose(0, 1).reshape(-1, y.shape[-1])

    def _is_shared(self, kind: type[Kind], x: Tensor) -> bool:
        """Whether the input is the same for all samples, as positions are; the output then gets their dimension."""
        if issubclass(kind, Convolution) and x.shape[0] == 1:  # may be one sample of many
            raise CannotJoin("computes a convolution of a single sample")
        if x.ndim > 1:
            return x.shape[0] == 1
        return kind is Embedding and x.ndim == 1 and self.inputs.are_shared(x.shape[0], self.joint.rows)

    def _cut(self, kind: type[Kind], x: Tensor) -> int:
        """How many of the layer's input rows are this batch's."""
        rows = kind.length(x)
        side = self.joint.side
        if side != "both":
            return rows if side == "first" else 0
        length, samples = x.shape[0] if x.ndim else 0, sum(self.joint.rows)
        if not length or length % samples or (x.ndim == 1 and kind is not Embedding):
            raise CannotJoin("folds the samples' dimension of a layer's input away")
        return rows // samples * self.joint.rows.first

    def _apart(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        record, side = self.record, self.joint.side
        if side == "second" and not torch.is_grad_enabled():
            return kind.apply(x, W, extra)
        is_new = torch._C._current_graph_task_id() == -1  # no recomputation by activation checkpointing
        self.is_by_itself |= is_new and side != "both"
        if self.is_by_itself and not is_new:  # nobody knows whose rows are computed again
            raise CannotJoin("is checkpointed around a layer that either side calls by itself")
        self._calls += is_new
        if record is not None:
            record.calls += is_new and side != "first"
        epsilon = self.epsilon
        u, v = (None, None) if epsilon is None else (epsilon.u, epsilon.v)
        if u is not None and rows is not None:
            u = u[rows]
        bias = extra if isinstance(extra, Tensor) else None
        other = None if isinstance(extra, Tensor) else extra
        x = as_multiplied(kind, x)
        if side == "first":
            self.inputs.note(x.shape)
        elif side == "both" and not issubclass(kind, Convolution):  # which may be given one sample of many
            self.inputs.compare(x.shape)
        if side == "both" and self._is_shared(kind, x):
            x = x.expand(sum(self.joint.rows), *x.shape[x.ndim > 1 :])
        tap = None if record is None else record.tap
        y: Tensor = _Apart.apply(
            x, W, bias, tap, u, v, kind, other, self._cut(kind, x), (self.joint, record, rows, self.mixed)
        )
        if y.dtype == torch.float16:
            raise CannotJoin(IN_HALF)
        return y

    def _split(self, kind: type[Kind], x: Any, W: Any, extra: Any) -> Tensor:
        """A tensor-parallel layer, by torch's own function; ε's effect is added to the first rows.

        Its gradient sees the rows behind too, whose loss counts too little to leave anything.
        """
        split = layout(x, W) if is_sharded(W) else None
        if split is None or kind is not Linear:
            raise CannotJoin("has a tensor-parallel layer that is not split by the rows or columns of a linear one")
        y = kind.apply(x, W, extra)
        if y.dtype == torch.float16:
            raise CannotJoin(IN_HALF)
        side, record, epsilon = self.joint.side, self.record, self.epsilon
        if side == "second" and not torch.is_grad_enabled():
            return y
        cut = self._cut(kind, x)
        is_new = torch._C._current_graph_task_id() == -1
        self._calls += is_new
        if epsilon is not None and cut:
            samples = x.shape[0] * cut // kind.length(x)

            def of_block(x: Tensor, here: Block) -> Tensor:
                added = kind.delta(x[:samples], epsilon.u[here.rows].to(x.device), epsilon.v[here.columns].to(x.device))
                others = added.new_zeros(len(x) - samples, *added.shape[1:])
                return torch.cat([added, others]).to(y.dtype)

            y = y + output_of_blocks(x, W, y, of_block)
        if record is None or side == "first" or not torch.is_grad_enabled():
            return y
        record.calls += is_new
        record.block = block(W)
        X = local(x).detach()

        def take(D: Any) -> None:
            with torch.no_grad(), without_autocast(X.device):
                rows, gradients = kind.rows(X, split.gather_gradient(D), None)
                if self.mixed is not None:
                    self.mixed.look(gradients, cut)
                record.take(kind, rows[cut:], gradients[cut:], record.block.shape[0], None)

        y = tapped(y, record.tap)
        y.register_hook(take)  # type: ignore[no-untyped-call]
        return y

    # ------------------------------------------------------------ what others do with the weight

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """W + ε for a function that reads the weight beside its layer."""
        if self.alone is None:
            raise CannotJoin("reads a weight outside its layer")
        return W if self.epsilon is None else self.alone.value(W, tracked)

    def keep(self, entries: Tensor) -> None:
        """Somebody is about to put others in the place of the weight's entries."""
        if self.alone is None:
            raise CannotJoin("puts something else in a weight's place")
        self.alone.keep(entries)

    def restore(self, W: Tensor) -> None:
        """Put the weight's own entries back, where others stand in their place."""
        if self.alone is not None:
            self.alone.restore(W)

    def is_written(self) -> bool:
        """Whether somebody wrote into what :meth:`value` gave, or put something else in the weight's place."""
        return self.alone is not None and self.alone.is_written()


class _Apart(torch.autograd.Function):
    """The layer of :class:`Apart`: gradients of weight and bias from the first rows, products from the others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, tap: Tensor | None, u: Tensor | None, v: Tensor | None,
        kind: type[Kind], extra: Any, cut: int, reports: tuple[Joint, Record | None, slice | None, Mixed | None],
    ) -> Tensor:  # fmt: skip
        ctx.forms = False
        if u is not None and v is not None and cut > 0 and _is_exact(kind, x, W, u):
            ctx.forms = True
            y = _by_parts(x.reshape(-1, x.shape[-1]), _right(kind, W), _right(kind, torch.addr(W, u, v)), cut, bias)
            y = y.view(*x.shape[:-1], y.shape[-1]).detach()  # an activation could not overwrite a view
        else:
            y = kind.apply(x, W, extra if bias is None else bias)
            if y._is_view():
                y = y.detach()
            if u is not None and v is not None and cut:
                X, Y = kind.rows(x, y, None)
                Y[:cut] += kind.delta(X[:cut], u.to(x.device), v.to(x.device)).to(y.dtype)
        ctx.save_for_backward(x, W.detach(), u, v)
        ctx.kind, ctx.extra, ctx.cut, ctx.reports = kind, extra, cut, reports
        return y

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        joint, record, rows, mixed = ctx.reports
        if joint.is_inside or torch.is_grad_enabled():
            raise CannotJoin("has a gradient inside its loss")
        x, W, u, v = ctx.saved_tensors
        kind: type[Kind] = ctx.kind
        n, cut = W.shape[0], ctx.cut
        input_gradient = weight_gradient = bias_gradient = None
        with without_autocast(D.device):
            X, D = kind.rows(x, D, ctx.extra)
            if mixed is not None:
                mixed.look(D, cut)
            if ctx.needs_input_grad[0] and ctx.forms:
                right, perturbed = (_right(kind, matrix).mT for matrix in (W, torch.addr(W, u, v)))
                input_gradient = _by_parts(D, right, perturbed, cut).view(x.shape)
            elif ctx.needs_input_grad[0]:
                input_gradient = kind.input_gradient(D, W, x)
                if u is not None and cut:
                    effect = kind.input_delta(D[:cut], u.to(D.device), v.to(D.device), X[:cut])
                    input_gradient.view(X.shape)[:cut] += effect.to(input_gradient.dtype)
            if ctx.needs_input_grad[1]:
                weight_gradient = kind.gradient(X[:cut], D[:cut], n)
            if ctx.needs_input_grad[2]:
                bias_gradient = kind.bias_gradient(D[:cut])
            if record is not None and cut < len(D):
                record.take(kind, X[cut:], D[cut:], n, rows)
        return input_gradient, weight_gradient, bias_gradient, *[None] * 7


def _is_exact(kind: type[Kind], x: Tensor, W: Tensor, u: Tensor) -> bool:
    """Whether W + uvᵀ is as precise as the layer's output, and its product is a matrix product."""
    alike = x.dtype == W.dtype == u.dtype and x.device == W.device == u.device
    return kind in (Linear, Conv1D) and alike  # u has at least float32


def _right(kind: type[Kind], W: Tensor) -> Tensor:
    """What rows are multiplied with from the right."""
    return W if kind is Conv1D else W.mT


def _by_parts(X: Tensor, matrix: Tensor, perturbed: Tensor, cut: int, bias: Tensor | None = None) -> Tensor:
    """The first rows of X times one matrix, the others times the other; every row is written once."""
    Y = X.new_empty(len(X), matrix.shape[1])
    for part, factor in ((slice(0, cut), perturbed), (slice(cut, None), matrix)):
        if bias is None:
            torch.mm(X[part], factor, out=Y[part])
        else:
            torch.addmm(bias, X[part], factor, out=Y[part])
    return Y
