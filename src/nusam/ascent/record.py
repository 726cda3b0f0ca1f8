"""What an ascent learns about one matrix as its layers' backwards run."""

from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nusam.ascent.function import as_multiplied, layer_with_products
from nusam.ascent.products import LayerGradient, Rows, Sum
from nusam.distributed.blocks import block, compute_device, is_sharded, layout, local, whole
from nusam.layers.kinds import Kind, Linear, Own, is_altered, is_plain, tapped
from nusam.lmo import State, matrix_shape
from nusam.power_iteration import Explicit, Matrix, TopPair, normalized, products, signs

__all__ = ["Job", "Record"]


class Job(NamedTuple):
    """What a pass is to do for one matrix."""

    state: State  # its warm start
    known: bool  # its products have agreed with its gradient before
    checks: bool  # form the gradient too, and compare
    forms: bool  # form the gradient and nothing else, by the layers' uses apart from others
    keeps: bool  # keep each use's input and output gradient, to be multiplied after the pass
    shares: bool  # with other processes
    frees: bool  # compare and free the gradient as soon as it is complete
    in_forward: bool  # ε is to live in the layers' forward


class Record:
    """What a pass learns about one matrix.

    In eager mode every use reports here as its backward runs. A compiled graph must be a pure function, so there the
    gradient of ``probe`` = [u, 0 (m), 0, 0 (m)] is [Gv, v, 1, Gᵀr] of the use, summed over uses.
    """

    def __init__(
        self,
        parameter: Tensor,
        job: Job,
        u: Tensor,
        iterations: int,
        stand_ins: dict[Tensor, Tensor],
        tap: Tensor,
        tap_node: Any,
    ) -> None:
        shape = matrix_shape(parameter)
        device = compute_device(parameter)
        self.parameter = parameter
        self.frozen = not parameter.requires_grad  # outside of the pass
        self.thaws = self.frozen and type(parameter) is nn.Parameter and parameter.is_floating_point()
        self.job = job
        self.iterations = iterations
        self.u = u.to(device)
        self.kept: list[Matrix] = []  # of every use that is multiplied after the pass
        self.formed: Tensor | None = None  # the gradient, of several uses
        self.waiting: LayerGradient | None = None  # the one use, small enough to be multiplied with others
        self.pair: tuple[Tensor, Tensor] | None = None  # Gv and v of the one use
        self.checked: Tensor | None = None  # Gᵀr by the layers, summed over uses
        self.gradient_checked: Tensor | None = None  # Gᵀr by the gradient, where that was freed
        self.gradient_pair: TopPair | None = None  # and what it gave
        self.block = whole(shape)  # of the matrix, what the layer multiplies with here
        self.calls = 0  # uses in forwards
        self.takes = 0  # and in backwards that accumulate
        self.completed = 0  # how often autograd has put a gradient into the parameter
        self.wanted_elsewhere = False  # whether the loss itself asks for the gradient
        self.dtypes: set[torch.dtype] = set()
        self.in_pieces = False
        self.is_altered = False  # whether a layer's function was another than torch's
        self._bias: Tensor | None = None
        self._stand_in: Tensor | None = None
        self._stand_ins = stand_ins  # leaves with the entries of parameters, which served uses compute with
        if parameter.requires_grad and not job.checks and not job.keeps and not is_sharded(parameter):
            self._stand_in = stand_ins[parameter] = parameter.detach().requires_grad_()
        self.has_more = False  # whether uses were seen that are not the layers'
        self._tap, self._tap_node = tap, tap_node
        self._probe: Tensor | None = None
        self.r = signs(shape[0], device, self.u.dtype) if job.checks else None

    def forget(self) -> None:
        """Nothing has happened yet."""
        self.kept, self.formed, self.waiting, self.pair = [], None, None, None
        self.calls = self.takes = 0

    # ------------------------------------------------------------ what happened

    @property
    def tap(self) -> Tensor:
        """What an output depends on that is to be reached where autograd accumulates."""
        return self._tap

    @property
    def probed(self) -> Tensor | None:
        """What compiled uses have left."""
        return None if self._probe is None else self._probe.grad

    @property
    def reached(self) -> bool:
        """Whether a backward that accumulates has passed."""
        return self.reached_layers or self.completed > 0

    @property
    def reached_layers(self) -> bool:
        """Whether products were taken."""
        return self.takes > 0 or self.probed is not None

    @property
    def coarsest(self) -> float:
        """The rounding unit of what the products were made of, as far as the host knows."""
        dtypes = {*self.dtypes, self.parameter.dtype} if self.parameter.is_floating_point() else {*self.dtypes}
        if self.probed is not None and self.parameter.dtype != torch.float64:
            dtypes.add(torch.bfloat16)  # an autocast inside a compiled graph is not seen
        return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)

    @property
    def once(self) -> bool:
        """Whether the pair is that of all of the layers' uses, as far as the host knows."""
        if self.probed is not None:
            return self.takes == 0
        return self.takes == 1 and self.calls <= 1 and self.pair is not None

    def is_lost(self) -> bool:
        """Whether only a part of the gradient is here, in a form that can't be added to."""
        if self.job.keeps:
            return False
        if self.job.checks:
            return self.gradient_checked is not None and self.completed > 1
        return self.pair is not None and not self.once

    @property
    def is_served_in_a_graph(self) -> bool:
        """Whether a compiled graph has left the products, and no gradient."""
        return self.probed is not None and not self.job.checks

    def count_differs(self) -> bool:
        """Whether a compiled graph has counted more than one use, where the host need not wait for that."""
        return self.is_served_in_a_graph and self.u.device.type == "cpu" and float(self.count()) != 1

    def settle(self) -> None:
        """Look for uses that were not the layers', and give the parameter what its stand-in got."""
        parameter, stand_in = self.parameter, self._stand_ins.get(self.parameter)
        own = None if stand_in is None else stand_in.grad
        if not self.job.checks and not self.job.keeps:
            self.has_more = parameter.grad is not None or (own is not None and not self.job.forms)
        if own is not None:
            parameter.grad = own if parameter.grad is None else parameter.grad + own

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Gv and v of the one use, or zeros where a compiled graph counted another number of them."""
        device = self.job.state["u"].device
        if self.probed is None:
            assert self.pair is not None
            return self.pair[0].to(device), self.pair[1].to(device)
        n, m = self.block.shape
        Gv, v, count, _ = torch.split(self.probed, [n, m, 1, m])
        once = count == 1
        return torch.where(once, Gv, 0).to(device), torch.where(once, v, 0).to(device)

    def count(self) -> Tensor:
        """Uses in the pass, on the device where a compiled graph counted them."""
        n, m = self.block.shape
        return self.u.new_tensor(float(self.takes)) if self.probed is None else self.probed[n + m] + self.takes

    def products_of_uses(self) -> Tensor | None:
        """Gᵀr by the layers, over all uses."""
        m = self.block.shape[1]
        if self.kept and self.r is not None:
            return Sum(self.kept).rmatvec(self.r)
        compiled = None if self.probed is None else self.probed[-m:]
        parts = [part for part in (self.checked, compiled) if part is not None]
        return reduce(torch.add, parts) if parts else None

    # ------------------------------------------------------------ while it happens

    def use(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor:
        """The layer's output, in whose backward the products are taken."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            return self._compiled_use(kind, x, W, extra) if rows is None else kind.apply(x, W, extra)
        if not torch.is_grad_enabled():
            return kind.apply(x, W, extra)
        if self.job.forms and kind is not Own:
            stand_in = self._stand_ins.get(self.parameter)
            if rows is None:
                return kind.apply(x, self._stand_in_for(W), extra)
            if stand_in is not None:
                return kind.apply(x, stand_in[rows], extra)
        if not is_plain(x):
            return kind.apply(x, W, extra)
        # recomputation by activation checkpointing is no new use
        self.calls += torch._C._current_graph_task_id() == -1
        self.in_pieces |= rows is not None
        if is_sharded(W) or kind is Own:
            return self._watch(kind, x, W, extra)
        if is_altered():
            self.is_altered = True
            return kind.apply(x, W, extra)
        if rows is not None and not self.job.checks and not self.job.keeps:
            return kind.apply(x, W, extra)
        x = as_multiplied(kind, x)
        given = W
        if not self.job.checks:
            given, extra = self._stand_in_for(W), self._stand_in_for_bias(extra)
        return layer_with_products(kind, x, given, extra, self._tap, None, None, self.iterations, (self, rows, W))

    def _compiled_use(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any) -> Tensor:
        if self.job.shares and self.frozen:
            raise RuntimeError(
                "A compiled model can't hand out what frozen weights need for an ε that processes share; leave out "
                "torch.compile, or use m_sam=True."
            )
        probe = self._probe
        if self.job.keeps or self.job.forms or is_sharded(W) or kind is Own or probe is None:
            return kind.apply(x, W, extra)  # its gradient will be formed
        x = as_multiplied(kind, x)
        if not self.job.checks:
            W, extra = W.detach(), extra.detach() if isinstance(extra, Tensor) else extra
        return layer_with_products(kind, x, W, extra, probe, self.u, self.r, self.iterations, None)

    def _stand_in_for(self, W: Tensor) -> Tensor:
        """What a served use computes with: no hook of the weight's sees a gradient that is not there."""
        own = self._stand_in if W is self.parameter else None
        return W.detach() if own is None else own

    def _stand_in_for_bias(self, bias: Any) -> Any:
        if not isinstance(bias, Tensor) or self._stand_in is None or not bias.requires_grad:
            return bias.detach() if isinstance(bias, Tensor) else bias
        if bias not in self._stand_ins:
            self._bias = bias
            self._stand_ins[bias] = bias.detach().requires_grad_()
        return self._stand_ins[bias]

    def make_probe(self) -> None:
        """Make the leaf whose gradient a compiled graph hands the products out by."""
        n, m = self.block.shape
        self._probe = self.u.new_zeros(n + m + 1 + m).requires_grad_()

    def accumulates(self) -> bool:
        """Whether the running backward accumulates; if not, it returns gradients that the loss itself asks for."""
        return bool(torch._C._will_engine_execute_node(self._tap_node))

    def forms_now(self) -> bool:
        """Whether gradients of weight and bias are formed in the running backward."""
        if self.job.checks or self.accumulates():
            return self.job.checks
        own = (self._stand_ins.get(p) for p in (self.parameter, self._bias) if p is not None)
        return any(stand_in is not None and _is_wanted(stand_in) for stand_in in own)

    def take(self, kind: type[Kind], X: Tensor, D: Tensor, n: int, rows: slice | None) -> None:
        """Take the products of one use, if autograd accumulates in this backward."""
        if not self.accumulates():
            self.wanted_elsewhere |= self.job.checks and _is_wanted(self.parameter)
            return
        self.takes += 1
        self.dtypes |= {D.dtype}
        G: Matrix = LayerGradient(kind, X, D, n)
        if rows is not None:
            G = Rows(G, rows, self.block.shape[0])
        self._multiply(G, (kind, X, D, n))

    def _multiply(self, G: Matrix, use: tuple[type[Kind], Tensor, Tensor, int]) -> None:
        if self.r is not None and not self.job.keeps:
            product = G.rmatvec(self.r)
            self.checked = product if self.checked is None else self.checked + product
        if self.job.keeps:
            self.kept.append(G)
        elif self.job.checks and not self.job.known and not is_sharded(self.parameter):
            pass  # its gradient counts in this pass
        elif self.calls <= 1 and self.takes == 1 and self._may_wait(G):
            self.waiting = cast(LayerGradient, G)
        elif self.calls <= 1 and self.takes == 1:
            (Gv,), (v,) = products([G], [self.u], self.iterations)
            self.pair = Gv, v
        elif not self.job.checks and self.pair is None and self.waiting is None:  # else it would be a part only
            kind, X, D, n = use
            formed = kind.gradient(X, D, n)
            self.formed = formed if self.formed is None else self.formed + formed

    def _may_wait(self, G: Matrix) -> bool:
        """Whether to multiply it with others later; a frozen matrix's input would not be kept otherwise."""
        return not self.frozen and isinstance(G, LayerGradient) and G.is_small()

    def complete(self, parameter: Tensor) -> None:
        """Autograd has put a gradient into a checked parameter; compare and free it if told so."""
        self.completed += 1
        gradient = parameter.grad
        if not self.job.frees or gradient is None:
            return
        G = Explicit(gradient.detach().to(self.u.dtype))
        assert self.r is not None
        product = G.rmatvec(self.r)
        self.gradient_checked = product if self.gradient_checked is None else self.gradient_checked + product
        us, vs = products([G], [self.u], self.iterations)
        (self.gradient_pair,) = normalized(us, vs, [self.u])
        parameter.grad = None

    def _watch(self, kind: type[Kind], x: Any, W: Any, extra: Any) -> Tensor:
        """A layer whose backward is left alone: its output's gradient is taken as it passes by."""
        split = layout(x, W) if is_sharded(W) else None
        if is_sharded(W) and (split is None or kind is not Linear):
            return kind.apply(x, W, extra)
        serves = not self.job.checks
        y = kind.apply(x, W.detach() if split and serves else W, extra)
        if split:
            self.block = block(W)
        X = local(x).detach()

        def take(D: Tensor) -> None:
            inputs = kind.rows(X, split.gather_gradient(D) if split else D, None)
            with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
                self.take(kind, *inputs, self.block.shape[0], None)

        # the tap is an input of what follows, so that it is reached where autograd accumulates
        y = tapped(y, self._tap)
        y.register_hook(take)  # type: ignore[no-untyped-call]
        return y


def _is_wanted(parameter: Tensor) -> bool:
    """Whether the running backward was asked for the parameter's gradient, as autograd.grad(loss, weight) asks."""
    if not (parameter.is_leaf and parameter.requires_grad) or is_sharded(parameter):
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # torch's answer for a leaf whose gradient is returned
        return True
