"""Convolutions: a kernel (o, i/g, k, …) of g groups counts as the matrix W (o × i/g·k·…) that its rows are in memory.

Each row of W is multiplied with patches of its own group's input. With the gradient D of the output, the gradient of W
has the rows G_o = Σ_p D_op · patch_p, over all samples and positions p. It need not be formed, and no patch is:

- Xv, what v makes of every patch, is a convolution with the one filter v, and Gv = Σ_p D_op (Xv)_p;
- Gᵀu = Σ_p (Σ_o u_o D_op) · patch_p is the gradient of one filter, from an output with one channel.

With groups, each group of a sample is a sample of its own in these: all groups meet the same filter.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from nusam.layers.kinds import Handler, Kind, as_published, dense
from nusam.lmo import unpacked_shape

__all__ = ["Convolution", "convolution_of", "given", "kernels_of"]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Settings(NamedTuple):
    """How a convolution goes over its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    around: tuple[int, ...] = ()  # what is padded before, as F.pad takes it
    mode: str = "constant"  # and how


class Convolution(Kind):
    """A convolution; there is a subclass for all settings."""

    settings: ClassVar[Settings]

    @classmethod
    def call(cls, handler: Handler, x: Any, W: Tensor, extra: Any) -> Tensor:
        settings = cls.settings
        dimensions = len(settings.kernel)
        if settings.around:
            x = F.pad(x, settings.around, settings.mode)
        if x.ndim == dimensions + 1:  # one sample without a dimension of samples
            return handler(cls, x.unsqueeze(0), W, extra).squeeze(0)
        return handler(cls, x, W, extra)

    @classmethod
    def apply(cls, x: Tensor, W: Tensor, extra: Any) -> Tensor:
        return cls._convolve(x, W, extra, cls.groups)

    @staticmethod
    def is_patched() -> bool:
        return (F.conv1d, F.conv2d, F.conv3d) != FUNCTIONS

    @staticmethod
    def rows(x: Tensor, D: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        """The samples as they are."""
        return x, D

    @classmethod
    def matvec(cls, X: Tensor, D: Tensor, v: Tensor, n: int) -> Tensor:
        Xv = cls._one_filter(X, v).view(X.shape[0], cls.groups, 1, D.shape[2:].numel())
        return (cls._by_groups(D) @ Xv.mT).sum(0).view(n)

    @classmethod
    def rmatvec(cls, X: Tensor, D: Tensor, u: Tensor) -> Tensor:
        x, one = cls._apart(X), cls._one_channel(D, u)
        taps = cls._taps(x)
        if taps is None:
            like = x.new_empty(1).expand(1, x.shape[1], *cls.settings.kernel)
            return cls._backward(one, x, like, of_input=False, groups=1).flatten()
        places = x.new_empty(1).expand(x.shape[0], taps.shape[1], *x.shape[2:])
        by_tap = cls._backward(one, places, taps, of_input=True, groups=1)
        return (x.flatten(2) @ by_tap.flatten(2).mT).sum(0).flatten()

    @classmethod
    def gradient(cls, X: Tensor, D: Tensor, n: int) -> Tensor:
        like = D.new_empty(1).expand(n, X.shape[1] // cls.groups, *cls.settings.kernel)
        return cls._backward(D, X, like, of_input=False)

    @staticmethod
    def bias_gradient(D: Tensor) -> Tensor:
        return D.flatten(2).sum((0, 2))

    @classmethod
    def input_gradient(cls, D: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return cls._backward(D, x, dense(W, D.dtype), of_input=True)

    @classmethod
    def delta(cls, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        xv = cls._one_filter(x.to(v.dtype), v)
        us = u.view(cls.groups, -1, *[1] * len(cls.settings.kernel))
        return (xv.view(x.shape[0], cls.groups, 1, *xv.shape[2:]) * us).flatten(1, 2)

    @classmethod
    def input_delta(cls, D: Tensor, u: Tensor, v: Tensor, X: Tensor) -> Tensor:
        x = cls._apart(X.to(u.dtype))
        filter_ = v.view(1, x.shape[1], *cls.settings.kernel)
        one = cls._one_channel(D.to(u.dtype), u)
        return cls._backward(one, x, filter_, of_input=True, groups=1).view(X.shape)

    @staticmethod
    def length(x: Tensor) -> int:
        return x.shape[0]

    # ------------------------------------------------------------ one filter for all groups

    @classmethod
    def _apart(cls, x: Tensor) -> Tensor:
        """The input with each group of a sample as a sample of its own: all of them meet the same filter."""
        return x if cls.groups == 1 else x.reshape(-1, x.shape[1] // cls.groups, *x.shape[2:])

    @classmethod
    def _one_filter(cls, x: Tensor, v: Tensor) -> Tensor:
        """What the filter v makes of every group: (samples · groups, 1, …)."""
        x = cls._apart(x)
        taps = cls._taps(x)
        if taps is None:
            return cls._convolve(x, v.view(1, x.shape[1], *cls.settings.kernel), None, 1)
        by_tap = v.view(x.shape[1], -1).mT @ x.flatten(2)
        return cls._convolve(by_tap.view(x.shape[0], taps.shape[1], *x.shape[2:]), taps, None, 1)

    @classmethod
    def _taps(cls, x: Tensor) -> Tensor | None:
        """A filter of which each channel has one tap, if those are fewer than the input's channels.

        What a filter of many channels does is then a product over channels, and this filter over what comes of it: a
        library pads one filter to as many as it computes at once, and that would be most of the work.
        """
        kernel = cls.settings.kernel
        count = math.prod(kernel)
        if count >= x.shape[1]:
            return None
        return torch.eye(count, device=x.device, dtype=x.dtype).view(1, count, *kernel)

    @classmethod
    def _one_channel(cls, D: Tensor, u: Tensor) -> Tensor:
        """The sum of each group's channels, weighted by u: (samples · groups, 1, …)."""
        return (u.view(cls.groups, 1, -1) @ cls._by_groups(D)).view(-1, 1, *D.shape[2:])

    @classmethod
    def _by_groups(cls, D: Tensor) -> Tensor:
        """An output as (samples, groups, channels of the group, positions)."""
        return D.reshape(D.shape[0], cls.groups, D.shape[1] // cls.groups, D.shape[2:].numel())

    @classmethod
    def _convolve(cls, x: Tensor, W: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        s = cls.settings
        function = (F.conv1d, F.conv2d, F.conv3d)[len(s.kernel) - 1]
        return function(x, W, bias, s.stride, s.padding, s.dilation, groups)

    @classmethod
    def _backward(cls, D: Tensor, x: Tensor, W: Tensor, of_input: bool, groups: int | None = None) -> Tensor:
        """The gradient of the input, or that of the kernel."""
        s = cls.settings
        mask = [of_input, not of_input, False]
        gradients = torch.ops.aten.convolution_backward(
            D, x, W, None, s.stride, s.padding, s.dilation, False, [0] * len(s.kernel), groups or cls.groups, mask
        )
        gradient: Tensor = gradients[0 if of_input else 1]
        return gradient


def convolution_of(module: nn.Module) -> type[Convolution] | None:
    """How a module convolves with its kernel, if it does as torch's own do."""
    found: Any = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    if found is None or "_conv_forward" in vars(module):
        return None
    for name in ("forward", "_conv_forward"):
        function = as_published(found, name)
        if function is None or getattr(type(module), name) is not function:
            return None
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return None
    module_: Any = module
    kernel = tuple(unpacked_shape(weight)[2:])
    try:
        stride, dilation = (_of_each(value, len(kernel)) for value in (module_.stride, module_.dilation))
        settings = Settings(kernel, stride, (0,) * len(kernel), dilation, module_.groups)
        if module_.padding_mode != "zeros":
            around, mode = tuple(module_._reversed_padding_repeated_twice), module_.padding_mode
            return _with(settings._replace(around=around, mode=mode))
        padding = module_.padding
        if padding == "valid":
            return _with(settings)
        if padding != "same":
            return _with(settings._replace(padding=_of_each(padding, len(kernel))))
    except (TypeError, ValueError):
        return None
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return _with(settings._replace(padding=tuple(total // 2 for total in totals)))
    around = tuple(side for total in reversed(totals) for side in (total // 2, total - total // 2))
    return _with(settings._replace(around=around))


def given(module: Any) -> tuple[Any, ...]:
    """All that a module convolves by, as it stands there."""
    own = vars(module)
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
    return (type(module)._conv_forward, own.get("_conv_forward"), *(own.get(name) for name in names))


def kernels_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a model's convolutions multiply patches with, or make such kernels of.

    A gain (o, 1, …), as weight norm has one for every filter, is a vector and none of them.
    """
    for module in model.modules():
        if isinstance(module, LAYERS):
            rows = module.out_channels, module.in_channels // module.groups
            kernel = torch.Size((*rows, *module.kernel_size))
            for parameter in module.parameters():
                if is_lazy(parameter):
                    continue
                shape = unpacked_shape(parameter)
                if shape == kernel or (len(shape) == len(kernel) and sum(length > 1 for length in shape) > 1):
                    yield parameter


@cache
def _with(settings: Settings) -> type[Convolution]:
    """The same class for the same settings, by which compiled graphs know it."""
    return type("Convolution", (Convolution,), {"settings": settings, "groups": settings.groups})


def _of_each(value: Any, dimensions: int) -> tuple[int, ...]:
    """A number for each dimension."""
    values = (value,) * dimensions if isinstance(value, int) else tuple(map(int, value))
    if len(values) != dimensions:
        raise ValueError
    return values
