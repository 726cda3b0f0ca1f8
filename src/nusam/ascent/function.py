"""A layer whose backward hands out products instead of its weight's gradient, or beside it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.products import LayerGradient
from nusam.interrupts import entered
from nusam.layers.kinds import UNSAFE_VIEW, Embedding, Kind
from nusam.power_iteration import products

__all__ = ["as_multiplied", "layer_with_products", "reporting_layer", "without_autocast"]


def as_multiplied(kind: type[Kind], x: Tensor) -> Tensor:
    """Under autocast, what a plain layer would save: the input as it is multiplied."""
    if not torch._C._is_any_autocast_enabled():
        return x
    device = x.device.type
    if kind is Embedding or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    multiplied: Tensor = x.to(torch.get_autocast_dtype(device))
    return multiplied


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute with the dtypes that are there; a compiled graph needs the context itself."""
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return entered(torch.autocast(device.type, enabled=False)) if torch._C._is_any_autocast_enabled() else nullcontext()


def reporting_layer(
    kind: type[Kind], x: Tensor, W: Tensor, extra: Any, tap: Tensor, reports: tuple[Any, slice | None, Tensor | None]
) -> Tensor:
    """A layer whose backward reports to a record, of the rows of a matrix and the weight itself, if it stays."""
    bias = extra if isinstance(extra, Tensor) else None
    output: Tensor = _Reporting.apply(x, W, bias, tap, kind, None if bias is not None else extra, reports)
    return output


def layer_with_products(
    kind: type[Kind], x: Tensor, W: Tensor, extra: Any, probe: Tensor, u: Tensor, r: Tensor | None, iterations: int
) -> Tensor:
    """A layer in a compiled graph, whose backward hands out products."""
    bias = extra if isinstance(extra, Tensor) else None
    extra = None if isinstance(extra, Tensor) else extra
    output: Tensor = _Products.apply(x, W, bias, probe, u, r, kind, extra, iterations)
    return output


class _Reporting(torch.autograd.Function):
    """A layer whose backward gives the input's gradient, those of weight and bias if asked, and reports.

    It can be differentiated again: a gradient inside the loss passes through the weight itself then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, tap: Tensor, kind: type[Kind], extra: Any,
        reports: tuple[Any, slice | None, Tensor | None],
    ) -> Tensor:  # fmt: skip
        y = kind.apply(x, W, extra if bias is None else bias)
        if y._is_view():
            y = y.detach()  # an activation could not overwrite a view
        late = reports[2] is None  # an engine could not free what is kept here
        ctx.save_for_backward(x.clone() if reports[0].job.copies else x, None if late else W)
        ctx.kind, ctx.extra, ctx.reports = kind, extra, reports
        if reports[0].was_frozen:
            ctx.input = x.shape, x.dtype, x.device
        return y

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        kind: type[Kind] = ctx.kind
        record, rows, own = ctx.reports
        try:
            x, W = ctx.saved_tensors
        except RuntimeError as error:
            if not (record.was_frozen and own is not None and "modified by an inplace operation" in str(error)):
                raise
            return _backward_without_input(ctx, D)
        if W is None:
            W = record.again()
        n = W.shape[0]
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        input_gradient = weight_gradient = bias_gradient = None
        again = torch.is_grad_enabled()
        accumulates = record.accumulates()
        if again:
            if own is None:
                raise RuntimeError(
                    "A gradient inside the loss depends on weights of which ZeRO 3 keeps a part only; use ZeRO 0 to 2, "
                    "or leave the perturbation out."
                )
            W = own  # a gradient inside the loss depends on it
        with without_autocast(D.device):
            X, D = kind.rows(x, D, ctx.extra)  # flat once: what is not contiguous is copied here
            if needs_input:
                input_gradient = kind.input_gradient(D, W, x)
            if (needs_weight or needs_bias) and record.forms_now(accumulates):
                weight_gradient = kind.gradient(X, D, n) if needs_weight else None
                bias_gradient = kind.bias_gradient(D) if needs_bias else None
            elif needs_bias and record.others_need_bias:
                bias_gradient = kind.bias_gradient(D)
            if again and accumulates:
                with torch.no_grad():
                    record.take(kind, X.detach(), D.detach(), n, rows, accumulates)
            else:
                record.take(kind, X, D, n, rows, accumulates)
        return input_gradient, weight_gradient, bias_gradient, None, None, None, None


def _backward_without_input(ctx: Any, D: Tensor) -> Any:
    """Of a frozen layer whose input was overwritten, which torch allows: without the products, until it is copied."""
    record, _, own = ctx.reports
    record.is_overwritten = True
    input_gradient = None
    if ctx.needs_input_grad[0]:
        shape, dtype, device = ctx.input
        x = torch.empty(shape, dtype=dtype, device=device)  # of which a linear layer's gradient knows the shape alone
        with without_autocast(D.device):
            input_gradient = ctx.kind.input_gradient(ctx.kind.rows(x, D, ctx.extra)[1], own, x)
    return input_gradient, *[None] * 6


class _Products(torch.autograd.Function):
    """The same as a pure function: the gradient of its probe is a power iteration."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, probe: Tensor, u: Tensor, r: Tensor | None,
        kind: type[Kind], extra: Any, iterations: int,
    ) -> Tensor:  # fmt: skip
        y = kind.apply(x, W, extra if bias is None else bias)
        ctx.save_for_backward(x, W, u, r)
        ctx.kind, ctx.iterations, ctx.extra = kind, iterations, extra
        output: Tensor = UNSAFE_VIEW(y, y.shape)
        return output

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        x, W, u, r = ctx.saved_tensors
        kind: type[Kind] = ctx.kind
        n = W.shape[0]
        input_gradient = weight_gradient = bias_gradient = None
        with without_autocast(D.device):
            X, D = kind.rows(x, D, ctx.extra)
            if ctx.needs_input_grad[0]:
                input_gradient = kind.input_gradient(D, W, x)
            if ctx.needs_input_grad[1]:
                weight_gradient = kind.gradient(X, D, n)
            if ctx.needs_input_grad[2]:
                bias_gradient = kind.bias_gradient(D)
            with torch.no_grad():
                X = X.to(u.dtype) if X.is_floating_point() else X
                G = LayerGradient(kind, X, D.to(u.dtype), n)
                (Gv,), (v,) = products([G], [u], ctx.iterations)
                checked = v.new_zeros(v.shape) if r is None else G.rmatvec(r)
                probe_gradient = torch.cat([Gv, v, v.new_ones(1), checked])
        return input_gradient, weight_gradient, bias_gradient, probe_gradient, *[None] * 5
