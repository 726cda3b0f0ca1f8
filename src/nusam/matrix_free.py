"""Ascent without weight gradients: Algorithm 2's products from each layer's input and output gradient.

A whole sequential iteration, v from u and then u from the new v, fits inside the layer's backward (see
:mod:`nusam.layers` for the products), and the gradient is never formed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nusam.interrupts import always
from nusam.layers import Handler, Kind, Linear, Own, Use, rerouted
from nusam.lmo import matrix_shape
from nusam.power_iteration import Matrix, TopPair, normalized, products
from nusam.sharding import Block, block, compute_device, is_sharded, layout, local, whole

__all__ = ["LayerGradient", "MatrixFreeAscent", "why_not_served"]


class LayerGradient:
    """The gradient of a layer's matrix, multiplied without being formed."""

    def __init__(self, kind: type[Kind], X: Tensor, D: Tensor, n: int) -> None:
        self.kind, self.X, self.D, self.n = kind, X, D, n

    def matvec(self, v: Tensor) -> Tensor:
        X, D = self._in(v)
        return self.kind.matvec(X, D, v.to(D.device), self.n).to(v.device)

    def rmatvec(self, u: Tensor) -> Tensor:
        X, D = self._in(u)
        return self.kind.rmatvec(X, D, u.to(D.device)).to(u.device)

    def _in(self, like: Tensor) -> tuple[Tensor, Tensor]:
        X = self.X.to(like.dtype) if self.X.is_floating_point() else self.X
        return X, self.D.to(like.dtype)


class Sum:
    """The gradient of a matrix that was used several times."""

    def __init__(self, parts: list[LayerGradient]) -> None:
        self.parts = parts

    def matvec(self, v: Tensor) -> Tensor:
        return reduce(torch.add, [part.matvec(v) for part in self.parts])

    def rmatvec(self, u: Tensor) -> Tensor:
        return reduce(torch.add, [part.rmatvec(u) for part in self.parts])


def why_not_served(uses: list[Use], parameters: Iterable[Tensor]) -> dict[Tensor, str]:
    """The parameters that no layer can serve on its own, as far as the model's structure tells."""
    count: Counter[Tensor] = Counter(use.parameter for use in uses)
    reasons = {p: f"tied: used by {count[p]} layers" for p in parameters if count[p] > 1}
    return reasons | {p: "no known layer holds it" for p in parameters if count[p] == 0}


class MatrixFreeAscent:
    """One ascent pass in which the given uses of matrices hand out top pairs instead of gradients.

    Args:
        uses: where the model uses the matrices; those of one parameter must be one.
        warm_starts: u (n) of every parameter to be served.
        iterations: T of Algorithm 2.
        idle: parameters whose gradient nobody needs in this pass (biases, norms).
        keeps: whether layers hand out their input and output gradient for :meth:`part`, to be multiplied after
            the pass, instead of a top pair: products of summands that several processes hold must be added up
            before the next product. Costs both until then.
    """

    def __init__(
        self,
        uses: list[Use],
        warm_starts: dict[Tensor, Tensor],
        iterations: int,
        idle: Iterable[Tensor],
        keeps: bool = False,
    ) -> None:
        self.keeps = keeps
        self._uses = uses
        self._records = {p: _Record(p, u, iterations, keeps) for p, u in warm_starts.items()}
        self._idle = [parameter for parameter in idle if parameter.requires_grad]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the pass inside; the model is as found afterwards."""
        handlers: dict[Tensor, Handler] = {p: record.use for p, record in self._records.items()}

        def undo() -> None:
            for parameter in self._idle:
                parameter.requires_grad_(True)

        with always(undo), rerouted(self._uses, handlers):
            for parameter in self._idle:
                parameter.requires_grad_(False)
            yield

    def saw_gradients(self) -> bool:
        """Whether any backward has passed through a served layer."""
        return any(record.probe.grad is not None or record.kept for record in self._records.values())

    def top_pairs(self) -> dict[Tensor, TopPair]:
        """The pair of every parameter that was used once. Others have an ordinary gradient, if any.

        A matrix that was also used elsewhere has both; its pair is then dead: half of its gradient is not the
        gradient.
        """
        reached = {p: record for p, record in self._records.items() if record.probe.grad is not None}
        if not reached:
            return {}
        us, vs = zip(*(record.vectors() for record in reached.values()), strict=True)
        warm_starts = [record.warm_start for record in reached.values()]
        return dict(zip(reached, normalized(list(us), list(vs), warm_starts), strict=True))

    def part(self, parameter: Tensor) -> tuple[Matrix | None, Block]:
        """What the pass kept of the gradient (or of this process's summand), and of which block of it."""
        record = self._records.get(parameter)
        if record is None or not record.kept:
            return None, whole(matrix_shape(parameter)) if record is None else record.block
        return Sum(record.kept), record.block

    def release(self) -> None:
        """Let go of what was kept, which a loss that lives on would keep alive."""
        for record in self._records.values():
            record.kept = []

    def not_served(self) -> dict[Tensor, str]:
        """Why a matrix could not be served in this pass, as far as that is known on the host."""
        reasons: dict[Tensor, str] = {}
        for parameter, record in self._records.items():
            if record.calls > 1 and not self.keeps:
                reasons[parameter] = f"used {record.calls} times"
            elif record.probe.grad is not None and parameter.grad is not None:
                reasons[parameter] = "also used outside its layer"
            elif parameter.grad is not None and parameter.requires_grad:
                reasons[parameter] = "reached in pieces or by another way"
        return reasons

    def used_repeatedly_in_a_graph(self, counted: set[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Compiled passes count on the device alone: which of the others were counted there, and more than once.

        Waits for the device, so it is asked once for every parameter.
        """
        compiled = [
            (parameter, record.probe.grad[-1])
            for parameter, record in self._records.items()
            if parameter not in counted and record.calls == 0 and record.probe.grad is not None
        ]
        counts = torch.stack([count.float().to(compiled[0][1].device) for _, count in compiled]) if compiled else None
        return [parameter for parameter, _ in compiled], [] if counts is None else [c != 1 for c in counts.tolist()]


class _Record:
    """What a pass learns about one matrix.

    The gradient of ``probe`` = [u, 0 (m), 0] is [Gv, v, 1] of the use, summed over uses: a pure function of the
    layer, so it works inside a compiled graph. In eager mode uses are counted as they happen.
    """

    def __init__(self, parameter: Tensor, u: Tensor, iterations: int, keeps: bool) -> None:
        shape = matrix_shape(parameter)
        self.parameter = parameter
        self.warm_start = u
        self.iterations = iterations
        self.keeps = keeps
        self.kept: list[LayerGradient] = []
        self.block = whole(shape)  # of the matrix, what the layer multiplies with here
        u = u.to(compute_device(parameter))
        self.probe = torch.cat([u, u.new_zeros(shape[1] + 1)]).requires_grad_()
        self.calls = 0
        self.done = False

    def use(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any) -> Tensor:
        record = None
        compiling = torch.compiler.is_compiling()
        if compiling and self.keeps and not W.requires_grad:
            raise RuntimeError(
                "A compiled model can't hand out what frozen weights need for an ε that processes share; leave out "
                "torch.compile, or use m_sam=True."
            )
        if compiling and (self.keeps or is_sharded(W)):
            return kind.apply(x, W, extra)  # its gradient will be formed
        if not compiling:
            record = self
            # recomputation by activation checkpointing is no new use
            self.calls += torch._C._current_graph_task_id() == -1
            if is_sharded(W) or kind is Own:
                return self._watch(kind, x, W, extra)
        output: Tensor = _Products.apply(x, W, extra, self.probe, kind, self.iterations, record)
        return output

    def _watch(self, kind: type[Kind], x: Any, W: Any, extra: Any) -> Tensor:
        """A layer whose backward is left alone: its output's gradient is taken as it passes by."""
        split = layout(x, W) if is_sharded(W) else None
        if (self.calls > 1 and not self.keeps) or (is_sharded(W) and (split is None or kind is not Linear)):
            return kind.apply(x, W, extra)
        y = kind.apply(x, W.detach() if split else W, extra)
        y = y if y.requires_grad else y.detach().requires_grad_()
        if split:
            self.block = block(W)
        inputs = [local(x).detach()]

        def take(D: Tensor) -> None:
            self.done |= not inputs
            if self.done or not self.keeps:
                self.refuse_second_backward()
            rows = kind.rows(inputs.pop(), split.gather_gradient(D) if split else D, None)
            G = LayerGradient(kind, *rows, self.block.shape[0])
            if self.keeps:
                self.kept.append(G)
            else:
                with torch.no_grad():
                    (Gv,), (v,) = products([G], [self.probe.detach()[: G.n]], self.iterations)
                self.probe.grad = torch.cat([Gv, v, v.new_ones(1)])

        y.register_hook(take)  # type: ignore[no-untyped-call]
        return y

    def refuse_second_backward(self) -> None:
        if self.done:
            raise RuntimeError(
                f"A matrix of shape {tuple(self.parameter.shape)} saw two backward calls in one matrix-free ascent, "
                "whose products don't add up; call backward once a pass, loop over opt.passes(accumulate=True) for "
                "micro-batches, or use ascent='gradient'."
            )
        self.done = True

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Gv and v, or zeros where they are not those of the whole gradient."""
        n, m = self.block.shape
        gradient = self.probe.grad
        assert gradient is not None
        if self.parameter.grad is not None:
            gradient = torch.zeros_like(gradient)
        Gv, v, count = torch.split(gradient, [n, m, 1])
        once = count == 1
        device = self.warm_start.device
        return torch.where(once, Gv, 0).to(device), torch.where(once, v, 0).to(device)


class _Products(torch.autograd.Function):
    """A layer whose backward gives the input's gradient and, for the weight, a power iteration."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, extra: Any, probe: Tensor, kind: type[Kind], iterations: int, record: Any
    ) -> Tensor:
        y = kind.apply(x, W, extra)
        output: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # no view, so that an activation may overwrite it
        # under autocast, what a plain layer would save: the input as it was multiplied
        ctx.save_for_backward(x.to(y.dtype) if x.is_floating_point() else x, W, probe)
        ctx.kind, ctx.iterations, ctx.record = kind, iterations, record
        ctx.extra = None if isinstance(extra, Tensor) else extra
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, D: Tensor) -> Any:
        x, W, probe = ctx.saved_tensors
        kind: type[Kind] = ctx.kind
        n = W.shape[0]
        input_gradient = weight_gradient = probe_gradient = None
        with torch.autocast(D.device.type, enabled=False):
            X, D = kind.rows(x, D, ctx.extra)  # flat once: what is not contiguous is copied here
            if ctx.needs_input_grad[0]:
                input_gradient = kind.input_gradient(D, W).view(x.shape)
            record: _Record | None = ctx.record
            if record is not None and record.keeps:
                record.kept.append(LayerGradient(kind, X, D, n))  # of every use; their products are summed
                probe_gradient = torch.zeros_like(probe)
            elif record is not None and record.calls > 1:
                weight_gradient = kind.gradient(X, D, n)
            else:
                if record is not None:
                    record.refuse_second_backward()
                X = X.to(probe.dtype) if X.is_floating_point() else X
                G = LayerGradient(kind, X, D.to(probe.dtype), n)
                (Gv,), (v,) = products([G], [probe[:n]], ctx.iterations)
                probe_gradient = torch.cat([Gv, v, v.new_ones(1)])
        return input_gradient, weight_gradient, None, probe_gradient, None, None, None
