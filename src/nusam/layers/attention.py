"""torch's attention, which multiplies with its projections' weights itself."""

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nusam.layers.kinds import Handler, Linear

__all__ = ["HANDLER", "attend", "places_of", "sharded_attention"]

HANDLER = "_nusam_handler"  # where a parameter has its handler while a pass runs
_F: Any = F  # its private parts


def _linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    handler: Handler | None = getattr(W, HANDLER, None)
    return F.linear(x, W, bias) if handler is None else _behind_positions(handler, x, W, bias)


def _behind_positions(handler: Handler, x: Tensor, W: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
    """An attention computes with samples behind positions, which matters to a handler that tells samples apart."""
    inner: Callable[..., Tensor] | None = getattr(handler, "inner", None)
    return handler(Linear, x, W, bias, rows) if inner is None else inner(x, W, bias, rows)


def _packed(q: Tensor, k: Tensor, v: Tensor, W: Tensor, bias: Tensor | None = None) -> Any:
    """Where query, key and value differ, pieces of one matrix are multiplied."""
    if q is k and k is v:
        return _packed_self(q, k, v, W, bias)
    handler = getattr(W, HANDLER, None)
    if handler is None:
        return _F._in_projection_packed(q, k, v, W, bias)
    n = W.shape[0] // 3
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [
        _behind_positions(handler, x, W[i * n : (i + 1) * n], b, slice(i * n, (i + 1) * n))
        for i, (x, b) in enumerate(zip((q, k, v), biases, strict=True))
    ]


def places_of(module: nn.MultiheadAttention, handlers: dict[Tensor, Handler]) -> list[tuple[nn.Module, str, Handler]]:
    owners = (module, module.out_proj)
    named = [(owner, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None]
    return [(owner, name, handlers[p]) for owner, name, p in named if p in handlers]


def sharded_attention(
    module: nn.MultiheadAttention, places: list[tuple[nn.Module, str, Handler]], *args: Any, **kwargs: Any
) -> Any:
    """While it runs, FSDP2 has put other tensors in the place of those that the handlers are known by."""
    weights = [getattr(owner, name) for owner, name, _ in places]
    try:
        for W, (_, _, handler) in zip(weights, places, strict=True):
            setattr(W, HANDLER, handler)
        return attend(module, *args, **kwargs)
    finally:
        for W in weights:
            vars(W).pop(HANDLER, None)


def _rebound(function: Any, **names: Any) -> Any:
    """The function, with other objects behind some of the global names that it uses."""
    namespace = {**function.__globals__, **names}
    del namespace["__name__"]  # it would lead the compiler back to the module's own names
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_packed_self = _rebound(_F._in_projection_packed, linear=_linear)
_over_heads = _rebound(
    F.multi_head_attention_forward,
    linear=_linear,
    _in_projection_packed=_packed,
    _in_projection=_rebound(_F._in_projection, linear=_linear),
)
_no_fast_path = SimpleNamespace(mha=SimpleNamespace(get_fastpath_enabled=lambda: False))  # by its weights alone
attend = _rebound(
    nn.MultiheadAttention.forward,
    F=SimpleNamespace(**{**vars(F), "multi_head_attention_forward": _over_heads}),
    torch=SimpleNamespace(**{**vars(torch), "backends": _no_fast_path}),
)
