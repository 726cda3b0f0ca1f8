"""ε in the forward: a layer computes with W + uvᵀ, and W is never written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_tracing

from nusam.distributed.blocks import Block, is_sharded, output_of_blocks
from nusam.interrupts import entered
from nusam.layers.kinds import Kind, Linear, Own, is_altered, is_plain, is_transformed, plus
from nusam.layers.reads import Watched, untold

__all__ = ["InForward"]


SMALL = 2**15  # entries of a matrix up to which W + ε is formed sooner than its effect is added


class InForward:
    """A layer with W + uvᵀ, computed without writing W: y = xWᵀ + b + (x·v)uᵀ, exact in any precision.

    Whoever reads the weight itself gets W + uvᵀ too, in the weight's precision, until ``is_over`` says that the pass
    has had its last backward.
    """

    def __init__(self, u: Tensor, v: Tensor, is_over: Callable[[], bool] = bool) -> None:
        self.u, self.v, self.is_over = u, v, is_over
        self.calls = 0  # that added it, outside of compiled graphs
        self._is_small: bool | None = None  # whether W + ε is formed, asked once
        self._values: tuple[Tensor, int] | None = None  # W + ε without gradients, and its version
        self._kept: Tensor | None = None  # the entries of W, in whose place somebody has put others

    def __call__(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
            if is_fx_tracing():
                raise RuntimeError(
                    "A layer whose ε lives in its forward is recorded in the descent, as torch.func.linearize does, "
                    "which can't follow ε; use placement='weights', or exclude the layer with targets=."
                )
            if not is_sharded(W) and kind is not Own and (is_altered(kind) or type(x) is Watched or not is_plain(x)):
                return self._dense(kind, x, W, extra, rows)
            if type(W) is Watched:
                perturbed: Tensor = untold(self._added, kind, x, W, extra, rows)
                return perturbed
        return self._added(kind, x, W, extra, rows)

    def _dense(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        """By the perturbed weight itself, in a precision that holds it."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        perturbed: Tensor = untold(lambda: W.to(dtype) + self._outer(W, dtype, rows))
        if dtype == W.dtype:
            return kind.apply(x, perturbed, extra)
        with entered(torch.autocast(W.device.type, enabled=False)):
            x = x.to(dtype) if x.is_floating_point() else x
            y = kind.apply(x, perturbed, extra.to(dtype) if isinstance(extra, Tensor) else extra)
        return y.to(W.dtype)

    def _added(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None) -> Tensor:
        if not torch.compiler.is_compiling() and self._forms(W):
            return kind.apply(x, plus(W, self.u if rows is None else self.u[rows], self.v), extra)
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

    def _forms(self, W: Tensor) -> bool:
        """Whether the sum W + uvᵀ is formed: where it is small, and as precise as the layer's output."""
        if self._is_small is None:
            alike = W.dtype == self.u.dtype == self.v.dtype and W.device == self.u.device
            self._is_small = alike and W.numel() <= SMALL and type(W) in (nn.Parameter, Tensor, Watched)
        return self._is_small and W.requires_grad and not torch._C._is_any_autocast_enabled()

    def _outer(self, W: Tensor, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        return torch.outer(self.u[rows or slice(None)], self.v).to(W.device, dtype).view(W.shape)

    def _delta(self, kind: type[Kind], x: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return kind.delta(x, self.u[rows].to(x.device), self.v[columns].to(x.device))

    # ------------------------------------------------------------ what others do with the weight

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """W + ε, for a function that reads the weight beside its layer."""
        if self.is_over() or not W.numel():  # what an engine keeps elsewhere nobody reads
            return W
        if is_transformed() or (tracked and torch.is_grad_enabled() and W.requires_grad):
            return W + self._outer(W, W.dtype)
        if self._values is None:
            with entered(torch.inference_mode(False), torch.no_grad()):
                values = W + self._outer(W, W.dtype)
            self._values = values, values._version
        return self._values[0]

    def keep(self, entries: Tensor) -> None:
        """Somebody is about to put others in the place of the weight's entries."""
        if self._kept is None and not self.is_over():
            self._kept = entries

    def restore(self, W: Tensor) -> None:
        """Put the weight's own entries back, where others stand in their place."""
        if self._kept is not None:
            W.data = self._kept

    def is_written(self) -> bool:
        """Whether somebody wrote into what :meth:`value` gave, or put something else in the weight's place."""
        written = self._values is not None and self._values[0]._version != self._values[1]
        return written or self._kept is not None
