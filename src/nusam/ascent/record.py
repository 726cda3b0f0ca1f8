"""How the uses of one matrix report to an ascent as their backwards run."""

from typing import Any, cast

import torch
from torch import Tensor

from nusam.ascent.findings import Findings, Job, leaf_of
from nusam.ascent.function import as_multiplied, layer_with_products, reporting_layer
from nusam.ascent.products import LayerGradient, Rows
from nusam.distributed.blocks import block, is_sharded, layout, local
from nusam.layers.kinds import Kind, Linear, Own, is_altered, is_foreign, is_plain, is_quantized, is_rounded, tapped
from nusam.layers.reads import untold
from nusam.norms import norm_of
from nusam.power_iteration import Explicit, Matrix, as_matrix, normalized, products

__all__ = ["Job", "Record"]


class Record(Findings):
    """What a pass learns about one matrix.

    In eager mode every use reports here as its backward runs. A compiled graph must be a pure function, so there the
    gradient of ``probe`` = [u, 0 (m), 0, 0 (m)] is [Gv, v, 1, Gᵀr] of the use, summed over uses.
    """

    def use(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any, rows: slice | None = None) -> Tensor:
        """The layer's output, in whose backward the products are taken."""
        compiling = torch.compiler.is_compiling()
        if self.is_aside or not (self.frozen or W.requires_grad):  # put aside for this use
            return kind.apply(x, W, extra)
        if compiling:
            return self._compiled_use(kind, x, W, extra) if rows is None else kind.apply(x, W, extra)
        if not torch.is_grad_enabled():
            return kind.apply(x, W, extra)
        if self.job.apart and kind is not Own:
            if self._comes_again(kind, x, rows):
                W = untold(self.parameter.detach)
                x, extra = as_multiplied(kind, x), extra.detach() if isinstance(extra, Tensor) else extra
                self._count_call()
                return reporting_layer(kind, x, W, extra, self._tap, (self, None, None))
            own = self._followed()
            W = own if rows is None else own[rows]
        if self.job.forms and kind is not Own:
            stand_in = self._stand_ins.get(self.parameter)
            if rows is None:
                return kind.apply(x, W if self.job.apart else self._stand_in_for(W), extra)
            if stand_in is not None:
                return kind.apply(x, stand_in[rows], extra)
        if not is_plain(x):
            return kind.apply(x, W, extra)
        self._count_call()
        if rows is not None:
            self.in_pieces = True
        if is_sharded(W) or kind is Own or self._has_own_gradient(kind, W):
            return self._watch(kind, x, W, extra)
        if is_altered(kind):
            self.is_altered = True
            return kind.apply(x, W, extra)
        if rows is not None and not self.job.checks and not self.job.keeps:
            return kind.apply(x, W, extra)
        x = as_multiplied(kind, x)
        given = W
        if not self.job.checks:
            given, extra = self._stand_in_for(W), self._stand_in_for_bias(extra)
        return reporting_layer(kind, x, given, extra, self._tap, (self, rows, W))

    def _has_own_gradient(self, kind: type[Kind], W: Tensor) -> bool:
        """Whether the weight's class may have another gradient than the layer's."""
        return kind is not Own and is_foreign(W) and not (self.frozen and is_quantized(W))

    def _count_call(self) -> None:
        # recomputation by activation checkpointing is no new use
        self.calls += torch._C._current_graph_task_id() == -1

    def _comes_again(self, kind: type[Kind], x: Tensor, rows: slice | None) -> bool:
        """Whether the weight, of which the engine keeps a part only, comes back for the backward of this use."""
        serves = self.elsewhere and rows is None and not self.job.checks and not self.job.forms
        return serves and is_plain(x) and not is_altered(kind)

    def _compiled_use(self, kind: type[Kind], x: Tensor, W: Tensor, extra: Any) -> Tensor:
        if self.job.shares and self.frozen and not self.job.apart:
            raise RuntimeError(
                "A compiled model can't hand out what frozen weights need for an ε that processes share; leave out "
                "torch.compile, or use m_sam=True."
            )
        probe = self._probe
        if self.job.apart:
            W = self.leaf
        own = kind is Own or self._has_own_gradient(kind, W)
        if self.job.keeps or self.job.forms or is_sharded(W) or own or probe is None:
            return kind.apply(x, W, extra)  # its gradient will be formed
        x = as_multiplied(kind, x)
        if not self.job.checks:
            keeps = self.others_need_bias or not isinstance(extra, Tensor)
            W, extra = W.detach(), extra if keeps else extra.detach()
        return layer_with_products(kind, x, W, extra, probe, self.u, self.r, self.iterations)

    def _stand_in_for(self, W: Tensor) -> Tensor:
        """What a served use computes with: no hook of the weight's sees a gradient that is not there."""
        own = self._stand_in if W is self.parameter and not self.job.apart else None
        return W.detach() if own is None else own

    def _stand_in_for_bias(self, bias: Any) -> Any:
        if self.others_need_bias:
            return bias
        if not isinstance(bias, Tensor) or self._stand_in is None or not bias.requires_grad:
            return bias.detach() if isinstance(bias, Tensor) else bias
        stand_in = self._stand_ins.get(bias)
        if stand_in is None:
            self._bias = bias
            stand_in = self._stand_ins[bias] = leaf_of(bias)
        return stand_in

    def again(self) -> Tensor:
        """The weight in its backward."""
        parameter: Any = self.parameter
        if not parameter.numel():
            parameter.all_gather()
        return cast(Tensor, untold(parameter.detach))

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """For a function that reads the weight beside its layer: what gets a gradient in its place."""
        if self.is_aside or not tracked or not torch.is_grad_enabled() or (self.elsewhere and not W.numel()):
            return W
        return self._followed()

    def _followed(self) -> Tensor:
        """What a use apart from the parameter computes with, and autograd follows."""
        if not self.elsewhere:
            return self.leaf
        leaf: Tensor = untold(self.parameter.detach).requires_grad_()
        # a function may ask it what it asks an engine's parameters
        vars(leaf).update({name: value for name, value in vars(self.parameter).items() if name.startswith("ds_")})
        if self.job.checks:
            leaf.register_post_accumulate_grad_hook(self.complete)  # type: ignore[no-untyped-call]
        self.leaves.append(leaf)
        return leaf

    def make_probe(self) -> None:
        """Make the leaf whose gradient a compiled graph hands the products out by."""
        n, m = self.block.shape
        self._probe = self.u.new_zeros(n + m + 1 + m).requires_grad_()

    def accumulates(self) -> bool:
        """Whether the running backward accumulates; if not, it returns gradients that the loss itself asks for."""
        return bool(torch._C._will_engine_execute_node(self._tap_node))

    def forms_now(self, accumulates: bool) -> bool:
        """Whether gradients of weight and bias are formed in the running backward."""
        if self.job.checks or accumulates:
            return self.job.checks
        own = (self._stand_ins.get(p) for p in (self.parameter, self._bias) if p is not None)
        return any(stand_in is not None and _is_wanted(stand_in) for stand_in in own)

    def take(
        self, kind: type[Kind], X: Tensor, D: Tensor, n: int, rows: slice | None, accumulates: bool | None = None
    ) -> None:
        """Take the products of one use, if autograd accumulates in this backward."""
        if not (self.accumulates() if accumulates is None else accumulates):
            self.wanted_elsewhere |= self.job.checks and _is_wanted(self.leaf)
            return
        self.takes += 1
        self.dtypes.add(D.dtype)
        G: Matrix = LayerGradient(kind, X, D, n)
        if rows is not None:
            G = Rows(G, rows, self.block.shape[0])
        self._multiply(G, (kind, X, D, n))

    def take_formed(self, gradient: Tensor) -> None:
        """Take the gradient itself, of some uses."""
        self.takes += 1
        if self.job.keeps:
            self.kept.append(Explicit(as_matrix(gradient).to(self.u.dtype)))
        else:
            self.formed = gradient if self.formed is None else self.formed + gradient

    def _multiply(self, G: Matrix, use: tuple[type[Kind], Tensor, Tensor, int]) -> None:
        if self.r is not None:
            _, X, D, _ = use
            scale = norm_of(D) * norm_of(X) if X.is_floating_point() else norm_of(D)
            self.scale = scale if self.scale is None else self.scale + scale
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
        frozen = self.frozen and not self.job.apart
        return not frozen and isinstance(G, LayerGradient) and G.is_small()

    def complete(self, parameter: Tensor) -> None:
        """Autograd has put a gradient into a checked parameter; compare and free it if told so."""
        self.completed += 1
        gradient = parameter.grad
        if not self.job.frees or gradient is None:
            return
        G = Explicit(as_matrix(gradient.detach()).to(self.u.dtype))
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
        own = self._has_own_gradient(kind, W)
        if own and self.job.checks:
            self.is_rounded |= is_rounded(kind, x, W, extra)
        y = kind.apply(x, W.detach() if (split or own) and not self.job.checks else W, extra)
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
