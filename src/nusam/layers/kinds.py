"""How each kind of layer uses its matrix W (n×m): output, products with its gradient, effect of a rank-one ε.

With the layer's input rows X and the gradient D of its output rows, both at hand in the backward, the gradient G
of W need not be formed to be multiplied: for a linear layer G = DᵀX, so Gv = Dᵀ(Xv) and Gᵀu = Xᵀ(Du).
"""

import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._device import DeviceContext

from nusam.distributed.blocks import is_on_its_way, is_sharded
from nusam.layers.reads import Watched, read_again
from nusam.power_iteration import times

__all__ = [
    "Conv1D",
    "Embedding",
    "Kind",
    "Linear",
    "Own",
    "UNSAFE_VIEW",
    "as_published",
    "is_altered",
    "is_plain",
    "is_recorded",
    "is_transformed",
    "plus",
    "tapped",
]


UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


class Kind:
    """A linear layer: y = xWᵀ + b, with x (..., m) and y (..., n), so G = DᵀX."""

    groups = 1  # of rows that meet inputs of their own

    @classmethod
    def call(cls, handler: "Handler", x: Any, W: Tensor, extra: Any) -> Tensor:
        """The layer's output by a handler, from what the module was given."""
        return handler(cls, x, W, extra)

    @staticmethod
    def apply(x: Tensor, W: Tensor, extra: Any) -> Tensor:
        return read_again(F.linear(x, W, extra), W)

    @staticmethod
    def is_patched() -> bool:
        """Whether somebody has put another function in the place of torch's."""
        linear: Any = F.linear
        same = linear is torch._C._nn.linear or getattr(linear, "__module__", "") in _SAME_LINEAR
        return not same or F.embedding is not _EMBEDDING

    @staticmethod
    def rows(x: Tensor, D: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        """X (T×m) and D (T×n)."""
        return x.reshape(-1, x.shape[-1]), D.reshape(-1, D.shape[-1])

    @staticmethod
    def matvec(X: Tensor, D: Tensor, v: Tensor, n: int) -> Tensor:
        """Gv, of length n."""
        return times(D.mT, times(X, v))

    @staticmethod
    def rmatvec(X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        """Gᵀu, of length m."""
        return times(X.mT, times(D, u))

    @staticmethod
    def gradient(X: Tensor, D: Tensor, n: int) -> Tensor:
        """G itself, where it must be formed."""
        return D.mT @ X

    @staticmethod
    def bias_gradient(D: Tensor) -> Tensor:
        return D.sum(0)

    @staticmethod
    def input_gradient(D: Tensor, W: Tensor, x: Tensor) -> Tensor:
        """Of the input, in the shape of ``x``."""
        return (D @ dense(W, D.dtype)).view(x.shape)

    @staticmethod
    def delta(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """What ε = uvᵀ adds to the output."""
        return (x.to(v.dtype) @ v).unsqueeze(-1) * u

    @classmethod
    def input_delta(cls, D: Tensor, u: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """What ε = uvᵀ adds to the gradient of the input rows ``X``."""
        return cls.delta(D, v, u)

    @staticmethod
    def length(x: Tensor) -> int:
        """How many rows :meth:`rows` makes of the input."""
        return x.numel() // max(1, x.shape[-1])


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
        return times(X.mT, times(D, v))

    @staticmethod
    def rmatvec(X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        return times(D.mT, times(X, u))

    @staticmethod
    def gradient(X: Tensor, D: Tensor, n: int) -> Tensor:
        return X.mT @ D

    @staticmethod
    def input_gradient(D: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return (D @ dense(W, D.dtype).mT).view(x.shape)

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
        formed: Tensor = torch.ops.aten.embedding_dense_backward(D, X, n, -1, False)  # as torch rounds it
        return formed

    @staticmethod
    def delta(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return u[x].unsqueeze(-1) * v

    @staticmethod
    def length(x: Tensor) -> int:
        return x.numel()


class Handler(Protocol):
    """What a layer calls in the place of its own function; ``rows`` if W is a piece of the matrix."""

    def __call__(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor: ...


def as_published(kind: type[nn.Module], name: str = "forward") -> Any:
    """The class's function of that name, unless somebody has patched it."""
    function = getattr(kind, name)
    code = getattr(function, "__code__", None)
    return function if code and code.co_filename == sys.modules[kind.__module__].__file__ else None


def dense(W: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a weight, which a tensor subclass such as torchao's keeps in another form."""
    entries = W.dequantize() if is_foreign(W) else W
    return entries if entries.dtype is dtype else entries.to(dtype)


def is_foreign(W: Tensor) -> bool:
    """Whether the weight is of a class of others, such as torchao's, with functions of its own."""
    return type(W) not in (Tensor, nn.Parameter, Watched) and not is_sharded(W)


def held(W: Tensor) -> Tensor:
    """What a weight's entries are kept in: of a class of others, the largest tensor inside of it."""
    if not is_foreign(W) or not hasattr(W, "__tensor_flatten__"):
        return W
    names, _ = W.__tensor_flatten__()
    return held(max((getattr(W, name) for name in names), key=Tensor.numel))


def is_quantized(W: Tensor) -> bool:
    """Whether a weight is kept in fewer bits than its own class of numbers has."""
    kept = held(W).dtype
    return kept != W.dtype and kept.itemsize < 2


@torch.no_grad()
def is_rounded(kind: type[Kind], x: Tensor, W: Tensor, extra: Any) -> bool:
    """Whether a layer computes with far fewer digits than its weight has, as those of three values do."""
    quantized: Any = W
    entries = quantized.dequantize() if is_quantized(W) else held(W)
    exact = kind.apply(x, entries.to(x.dtype) if x.is_floating_point() else entries, None).float()
    computed = kind.apply(x, W, None).float()
    return float((computed - exact).norm()) > ROUNDED * float(exact.norm())


def plus(W: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W + uvᵀ, in the shape of W."""
    return torch.addcmul(W, u.unsqueeze(-1), v) if W.ndim == 2 else W + torch.outer(u, v).view(W.shape)


def is_plain(x: Tensor) -> bool:
    """Whether the input is rows of numbers: not nested, not sparse, and not inside vmap, jvp or the like."""
    ordinary = type(x) is Tensor or isinstance(x, nn.Parameter) or is_sharded(x) or is_on_its_way(x)
    return ordinary and x.layout == torch.strided and not x.is_nested and not is_transformed()


def is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether torch.jit records what is computed, in which nothing of ours may stand."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def is_altered(kind: type[Kind]) -> bool:
    """Whether a layer's function may be another than torch's: by a TorchFunctionMode, or by a patch."""
    if kind.is_patched():
        return True
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(count))


_EMBEDDING = F.embedding
ROUNDED = 0.25  # of an output, by which eight and four bits leave it what it was
_SAME_LINEAR = {"deepspeed.runtime.zero.linear"}  # the same function, which reads the parameter anew in its backward


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
