"""How each kind of layer uses its matrix W (n×m): output, products with its gradient, effect of a rank-one ε.

With the layer's input rows X and the gradient D of its output rows, both at hand in the backward, the gradient G
of W need not be formed to be multiplied: for a linear layer G = DᵀX, so Gv = Dᵀ(Xv) and Gᵀu = Xᵀ(Du).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._device import DeviceContext

from nusam.distributed.sharding import Block, is_on_its_way, is_sharded, output_of_blocks
from nusam.interrupts import always, entered
from nusam.layers.reads import Watched, untold
from nusam.lmo import matrix_shape

__all__ = [
    "UNSAFE_VIEW",
    "Conv1D",
    "Embedding",
    "Handler",
    "InForward",
    "Kind",
    "Linear",
    "Own",
    "Use",
    "find_uses",
    "is_altered",
    "is_plain",
    "rerouted",
    "tapped",
]


UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
SMALL = 2**15  # entries of a matrix up to which W + ε is formed sooner than its effect is added


class Kind:
    """A linear layer: y = xWᵀ + b, with x (..., m) and y (..., n), so G = DᵀX."""

    @staticmethod
    def apply(x: Tensor, W: Tensor, extra: Any) -> Tensor:
        return F.linear(x, W, extra)

    @staticmethod
    def rows(x: Tensor, D: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        """X (T×m) and D (T×n)."""
        return x.reshape(-1, x.shape[-1]), D.reshape(-1, D.shape[-1])

    @staticmethod
    def matvec(X: Tensor, D: Tensor, v: Tensor, n: int) -> Tensor:
        """Gv, of length n."""
        return D.mT @ (X @ v)

    @staticmethod
    def rmatvec(X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        """Gᵀu, of length m."""
        return X.mT @ (D @ u)

    @staticmethod
    def gradient(X: Tensor, D: Tensor, n: int) -> Tensor:
        """G itself, where it must be formed."""
        return D.mT @ X

    @staticmethod
    def input_gradient(D: Tensor, W: Tensor) -> Tensor:
        return D @ dense(W, D.dtype)

    @staticmethod
    def delta(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """What ε = uvᵀ adds to the output."""
        return (x.to(v.dtype) @ v).unsqueeze(-1) * u


Linear = Kind


class Own(Kind):
    """A linear layer of a quantizing library, whose forward and backward are its own business.

    ``extra`` is that forward.
    """

    @staticmethod
    def apply(x: Tensor, W: Tensor, extra: Any) -> Tensor:
        y: Tensor = extra(x)
        return y


class Conv1D(Kind):
    """Hugging Face's Conv1D: y = xW + b, a linear layer with its matrix transposed, so G = XᵀD."""

    @staticmethod
    def apply(x: Tensor, W: Tensor, extra: Any) -> Tensor:
        return F.linear(x, W.mT, extra)

    @staticmethod
    def matvec(X: Tensor, D: Tensor, v: Tensor, n: int) -> Tensor:
        return X.mT @ (D @ v)

    @staticmethod
    def rmatvec(X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        return D.mT @ (X @ u)

    @staticmethod
    def gradient(X: Tensor, D: Tensor, n: int) -> Tensor:
        return X.mT @ D

    @staticmethod
    def input_gradient(D: Tensor, W: Tensor) -> Tensor:
        return D @ dense(W, D.dtype).mT

    @staticmethod
    def delta(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (x.to(u.dtype) @ u).unsqueeze(-1) * v


class Embedding(Kind):
    """A table whose rows are looked up: X is the index (T), one-hot rows of length n in effect.

    ``extra`` is the padding index, whose row gets no gradient.
    """

    @staticmethod
    def apply(x: Tensor, W: Tensor, extra: Any) -> Tensor:
        return F.embedding(x, W, extra)

    @staticmethod
    def rows(x: Tensor, D: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        index, rows = x.reshape(-1), D.reshape(-1, D.shape[-1])
        if extra is not None:
            rows = rows.masked_fill((index == extra)[:, None], 0)
        return index, rows

    @staticmethod
    def matvec(X: Tensor, D: Tensor, v: Tensor, n: int) -> Tensor:
        return v.new_zeros(n).index_add(0, X, D @ v)

    @staticmethod
    def rmatvec(X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        return D.mT @ u[X]

    @staticmethod
    def gradient(X: Tensor, D: Tensor, n: int) -> Tensor:
        return D.new_zeros(n, D.shape[1]).index_add(0, X, D)

    @staticmethod
    def delta(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return u[x].unsqueeze(-1) * v


def dense(W: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a weight, which a tensor subclass such as torchao's keeps in another form."""
    entries = W if type(W) in (Tensor, nn.Parameter, Watched) or is_sharded(W) else W.dequantize()
    return entries if entries.dtype is dtype else entries.to(dtype)


def is_plain(x: Tensor) -> bool:
    """Whether the input is rows of numbers: not nested, not sparse, and not inside vmap, jvp or the like."""
    ordinary = type(x) is Tensor or isinstance(x, nn.Parameter) or is_sharded(x) or is_on_its_way(x)
    return ordinary and x.layout == torch.strided and not x.is_nested and not is_transformed()


def is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_altered() -> bool:
    """Whether a layer's function may be another than torch's: by a TorchFunctionMode, or by a patch."""
    if F.linear is not torch._C._nn.linear or F.embedding is not _EMBEDDING:
        return True
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(count))


_EMBEDDING = F.embedding


def tapped(y: Tensor, tap: Tensor) -> Tensor:
    """The same output, which is reached in a backward because it depends on ``tap``; that gets no gradient."""
    output: Tensor = _Tapped.apply(y, tap)
    return output


class _Tapped(torch.autograd.Function):
    """The identity, with a second input that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tap: Tensor) -> Tensor:
        # no view where it can be had, so that an activation may overwrite it
        output: Tensor = y.view_as(y) if is_sharded(y) else UNSAFE_VIEW(y, y.shape)
        return output

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        return D, None


class Handler(Protocol):
    """What a layer calls in the place of its own function; ``rows`` if W is a piece of the matrix."""

    def __call__(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor: ...


class InForward:
    """A layer with W + uvᵀ, computed without writing W: y = xWᵀ + b + (x·v)uᵀ, exact in any precision.

    Whoever reads the weight itself gets W + uvᵀ too, in the weight's precision, until ``is_over`` says that the pass
    has had its last backward.
    """

    def __init__(self, u: Tensor, v: Tensor, is_over: Callable[[], bool] = bool) -> None:
        self.u, self.v, self.is_over = u, v, is_over
        self.calls = 0  # that added it, outside of compiled graphs
        self._values: tuple[Tensor, int] | None = None  # W + ε without gradients, and its version

    def __call__(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
            if not is_sharded(W) and kind is not Own and (is_altered() or type(x) is Watched or not is_plain(x)):
                return self._dense(kind, x, W, extra, rows)
            if type(W) is Watched:
                perturbed: Tensor = untold(self._added, kind, x, W, extra, rows)
                return perturbed
        return self._added(kind, x, W, extra, rows)

    def _dense(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        """By the perturbed weight itself, in a precision that holds it."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        perturbed: Tensor = untold(lambda: W.to(dtype) + self._outer(W.device, dtype, rows))
        if dtype == W.dtype:
            return kind.apply(x, perturbed, extra)
        with entered(torch.autocast(W.device.type, enabled=False)):
            x = x.to(dtype) if x.is_floating_point() else x
            y = kind.apply(x, perturbed, extra.to(dtype) if isinstance(extra, Tensor) else extra)
        return y.to(W.dtype)

    def _added(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        small = W.requires_grad and W.numel() <= SMALL and type(W) in (nn.Parameter, Tensor, Watched)
        if small and not torch.compiler.is_compiling() and self._is_exact(W):
            return kind.apply(x, torch.addr(W, self.u[rows or slice(None)], self.v), extra)
        y = kind.apply(x, W, extra)
        if is_sharded(W):
            if kind is not Linear:
                raise RuntimeError(
                    f"A tensor-parallel {kind.__name__} of shape {tuple(W.shape)} can't have an ε in its forward; "
                    "exclude it with targets=, or use placement='weights'."
                )

            def of_block(x: Tensor, here: Block) -> Tensor:
                return self._delta(kind, x, here.rows, here.columns).to(y.dtype)

            return y + output_of_blocks(x, W, y, of_block)
        return y + self._delta(kind, x, rows or slice(None)).to(y.dtype)

    def _is_exact(self, W: Tensor) -> bool:
        """Whether the sum W + uvᵀ is as precise as the layer's output."""
        precise = W.dtype == self.u.dtype == self.v.dtype and W.device == self.u.device
        return precise and not torch._C._is_any_autocast_enabled()

    def _outer(self, device: torch.device, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        return torch.outer(self.u[rows or slice(None)], self.v).to(device, dtype)

    def _delta(self, kind: type[Kind], x: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return kind.delta(x, self.u[rows].to(x.device), self.v[columns].to(x.device))

    # ------------------------------------------------------------ what others do with the weight

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """W + ε, for a function that reads the weight beside its layer."""
        if self.is_over():
            return W
        if is_transformed() or (tracked and torch.is_grad_enabled() and W.requires_grad):
            return W + self._outer(W.device, W.dtype)
        if self._values is None:
            with entered(torch.inference_mode(False), torch.no_grad()):
                values = W + self._outer(W.device, W.dtype)
            self._values = values, values._version
        return self._values[0]

    def is_written(self) -> bool:
        """Whether somebody wrote into what :meth:`value` gave."""
        return self._values is not None and self._values[0]._version != self._values[1]


class Use(NamedTuple):
    """One parameter as one module uses it."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    kind: type[Kind]
    forward: Any  # the function that its class computes with

    def is_current(self) -> bool:
        """Whether the module still uses the parameter so."""
        module = self.module
        return (
            module._parameters.get(self.name) is self.parameter
            and type(module).forward is self.forward
            and "forward" not in vars(module)
        )


def find_uses(model: nn.Module) -> Iterator[Use]:
    """Every matrix of the model that reaches its input through a layer whose forward is known."""
    linear, embedding, attention = map(_as_published, (nn.Linear, nn.Embedding, nn.MultiheadAttention))
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        if "forward" in vars(module):
            continue  # somebody replaced it already
        if forward is linear:
            yield from _uses(module, ("weight",), Linear)
        elif forward is embedding and not module.sparse and not module.scale_grad_by_freq:
            if module.max_norm is None:
                yield from _uses(module, ("weight",), Embedding)
        elif forward is attention:
            yield from _uses(module, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), Linear)
        elif isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
            yield from (use for use in _uses(module, ("weight",), Own) if not use.parameter.requires_grad)
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            yield from _uses(module, ("weight",), Conv1D)


def _as_published(kind: type[nn.Module]) -> Any:
    """The class's forward, unless somebody has patched it."""
    code = getattr(kind.forward, "__code__", None)
    return kind.forward if code and code.co_filename == sys.modules[kind.__module__].__file__ else None


def _uses(module: nn.Module, names: tuple[str, ...], kind: type[Kind]) -> Iterator[Use]:
    for name in names:
        parameter = module._parameters.get(name)
        if isinstance(parameter, nn.Parameter) and len(matrix_shape(parameter)) == 2:
            yield Use(module, name, parameter, kind, type(module).forward)


@contextmanager
def rerouted(uses: list[Use], handlers: dict[Tensor, Handler]) -> Iterator[None]:
    """Inside, each use of a parameter with a handler goes through it; the modules are as found afterwards.

    The forward is replaced on the instance: a thread-local mode would be missed by activation checkpointing,
    a class swap would fight those of other libraries, and torch.compile guards on the replacement.
    """
    forwards = {use.module: _forward(use, handlers) for use in uses if any(p in handlers for p in _multiplied(use))}

    def undo() -> None:
        for module, forward in forwards.items():
            if vars(module).get("forward") is forward:  # else somebody has replaced it in the pass
                vars(module).pop("forward", None)
        for parameter in handlers:
            vars(parameter).pop(_HANDLER, None)

    with always(undo):
        for parameter, handler in handlers.items():
            setattr(parameter, _HANDLER, handler)
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield


def _multiplied(use: Use) -> tuple[Tensor, ...]:
    """Whose use the module's forward decides; an attention multiplies with the weight of its output layer itself."""
    module = use.module
    return (use.parameter, module.out_proj.weight) if isinstance(module, nn.MultiheadAttention) else (use.parameter,)


def _forward(use: Use, handlers: dict[Tensor, Handler]) -> Callable[..., Any]:
    module: Any = use.module
    if isinstance(module, nn.MultiheadAttention):
        # It hands its projections' weights to F.linear itself, out_proj's included: so its functions run with an
        # F.linear of ours, which finds the handler on the weight.
        if is_sharded(use.parameter):
            return partial(_sharded_attention, module, _places(module, handlers))

        def attention(*args: Any, **kwargs: Any) -> Any:
            if type(module).forward is not use.forward:
                return type(module).forward(module, *args, **kwargs)
            weights = (*module._parameters.values(), module.out_proj.weight)
            if torch.compiler.is_compiling() or not any(type(W) is Watched for W in weights):
                return _multihead_attention(module, *args, **kwargs)
            return untold(_multihead_attention, module, *args, **kwargs)

        return attention
    kind, handler, own, parameter = use.kind, handlers[use.parameter], module.forward, use.parameter
    sharded = is_sharded(parameter)  # then FSDP2 puts what it gathered in its place

    def forward(*args: Any, **kwargs: Any) -> Any:
        if type(module).forward is not use.forward:  # patched while the pass runs
            return type(module).forward(module, *args, **kwargs)
        W = module.weight
        if len(args) + len(kwargs) != 1 or not (W is parameter or (sharded and isinstance(W, nn.Parameter))):
            return own(*args, **kwargs)  # torch.func.functional_call has put something else in the weight's place
        # whoever keeps this function beyond the pass finds what is there by then
        current = handler if torch.compiler.is_compiling() else vars(parameter).get(_HANDLER)
        if current is None:
            return type(module).forward(module, *args, **kwargs)
        (x,) = (*args, *kwargs.values())
        extra = module.padding_idx if kind is Embedding else own if kind is Own else module.bias
        return current(kind, x, W, extra)

    return forward


_F: Any = F  # its private parts


def _linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    handler: Handler | None = getattr(W, _HANDLER, None)
    return F.linear(x, W, bias) if handler is None else _behind_positions(handler, x, W, bias)


def _behind_positions(handler: Handler, x: Tensor, W: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
    """An attention computes with samples behind positions, which matters to a handler that tells samples apart."""
    inner: Callable[..., Tensor] | None = getattr(handler, "inner", None)
    return handler(Linear, x, W, bias, rows) if inner is None else inner(x, W, bias, rows)


def _packed(q: Tensor, k: Tensor, v: Tensor, W: Tensor, bias: Tensor | None = None) -> Any:
    """Where query, key and value differ, pieces of one matrix are multiplied."""
    if q is k and k is v:
        return _packed_self(q, k, v, W, bias)
    handler = getattr(W, _HANDLER, None)
    if handler is None:
        return _F._in_projection_packed(q, k, v, W, bias)
    n = W.shape[0] // 3
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [
        _behind_positions(handler, x, W[i * n : (i + 1) * n], b, slice(i * n, (i + 1) * n))
        for i, (x, b) in enumerate(zip((q, k, v), biases, strict=True))
    ]


def _places(module: nn.MultiheadAttention, handlers: dict[Tensor, Handler]) -> list[tuple[nn.Module, str, Handler]]:
    owners = (module, module.out_proj)
    named = [(owner, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None]
    return [(owner, name, handlers[p]) for owner, name, p in named if p in handlers]


def _sharded_attention(
    module: nn.MultiheadAttention, places: list[tuple[nn.Module, str, Handler]], *args: Any, **kwargs: Any
) -> Any:
    """While it runs, FSDP2 has put other tensors in the place of those that the handlers are known by."""
    weights = [getattr(owner, name) for owner, name, _ in places]
    try:
        for W, (_, _, handler) in zip(weights, places, strict=True):
            setattr(W, _HANDLER, handler)
        return _multihead_attention(module, *args, **kwargs)
    finally:
        for W in weights:
            vars(W).pop(_HANDLER, None)


def _rebound(function: Any, **names: Any) -> Any:
    """The function, with other objects behind some of the global names that it uses."""
    namespace = {**function.__globals__, **names}
    del namespace["__name__"]  # it would lead the compiler back to the module's own names
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_HANDLER = "_nusam_handler"
_packed_self = _rebound(_F._in_projection_packed, linear=_linear)
_attend = _rebound(
    F.multi_head_attention_forward,
    linear=_linear,
    _in_projection_packed=_packed,
    _in_projection=_rebound(_F._in_projection, linear=_linear),
)
_multihead_attention = _rebound(
    nn.MultiheadAttention.forward, F=SimpleNamespace(**{**vars(F), "multi_head_attention_forward": _attend})
)
