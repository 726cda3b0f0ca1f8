"""A layer whose backward hands out products instead of its weight's gradient, or beside it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.products import LayerGradient
from nusam.interrupts import entered
from nusam.layers.kinds import UNSAFE_VIEW, Embedding, Kind
from nusam.power_iteration import products

__all__ = ["layer_with_products", "as_multiplied", "without_autocast"]


def as_multiplied(kind: type[Kind], x: Tensor) -> Tensor:
    """Under autocast, what a plain layer would save: the input as it is multiplied."""
    device = x.device.type
    if not torch._C._is_any_autocast_enabled():
        return x
    if kind is Embedding or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    multiplied: Tensor = x.to(torch.get_autocast_dtype(device))
    return multiplied


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute with the dtypes that are there; a compiled graph needs the context itself."""
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return entered(torch.autocast(device.type, enabled=False)) if torch._C._is_any_autocast_enabled() else nullcontext()


def layer_with_products(
    kind: type[Kind],
    x: Tensor,
    W: Tensor,
    extra: Any,
    probe: Tensor,
    u: Tensor | None,
    r: Tensor | None,
    iterations: int,
    reports: Any,
) -> Tensor:
    """A layer whose backward hands out products."""
    bias = extra if isinstance(extra, Tensor) else None
    extra = None if isinstance(extra, Tensor) else extra
    output: Tensor = _Products.apply(x, W, bias, probe, u, r, kind, extra, iterations, reports)
    return output


class _Products(torch.autograd.Function):
    """A layer whose backward gives the input's gradient, those of weight and bias if asked, and a power iteration.

    It can be differentiated again: a gradient inside the loss passes through the weight itself then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, probe: Tensor, u: Tensor | None, r: Tensor | None,
        kind: type[Kind], extra: Any, iterations: int, reports: Any,
    ) -> Tensor:  # fmt: skip
        y = kind.apply(x, W, extra if bias is None else bias)
        if torch.compiler.is_compiling():
            y = UNSAFE_VIEW(y, y.shape)
        elif y._is_view():
            y = y.detach()  # an activation could not overwrite a view
        ctx.save_for_backward(x, W, u, r)
        ctx.kind, ctx.iterations, ctx.reports, ctx.extra = kind, iterations, reports, extra
        return y

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        x, W, u, r = ctx.saved_tensors
        kind: type[Kind] = ctx.kind
        n = W.shape[0]
        input_gradient = weight_gradient = bias_gradient = probe_gradient = None
        if torch.is_grad_enabled() and ctx.reports is not None:
            W = ctx.reports[2]  # the weight itself: a gradient inside the loss depends on it
        with without_autocast(D.device):
            X, D = kind.rows(x, D, ctx.extra)  # flat once: what is not contiguous is copied here
            if ctx.needs_input_grad[0]:
                input_gradient = kind.input_gradient(D, W, x)
            forms = ctx.reports is None or ctx.reports[0].forms_now()
            if ctx.needs_input_grad[1] and forms:
                weight_gradient = kind.gradient(X, D, n)
            if ctx.needs_input_grad[2] and forms:
                bias_gradient = kind.bias_gradient(D)
            with torch.no_grad():
                if ctx.reports is not None:
                    record, rows, _ = ctx.reports
                    record.take(kind, X.detach(), D.detach(), n, rows)
                else:
                    X = X.to(u.dtype) if X.is_floating_point() else X
                    G = LayerGradient(kind, X, D.to(u.dtype), n)
                    (Gv,), (v,) = products([G], [u], ctx.iterations)
                    checked = v.new_zeros(v.shape) if r is None else G.rmatvec(r)
                    probe_gradient = torch.cat([Gv, v, v.new_ones(1), checked])
        return input_gradient, weight_gradient, bias_gradient, probe_gradient, *[None] * 6
