"""What an ascent is to do for one matrix, and what it has found of it."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nusam.ascent.products import LayerGradient, Sum
from nusam.distributed.blocks import compute_device, is_sharded, whole
from nusam.lmo import State, matrix_shape, unpacked_shape
from nusam.power_iteration import Matrix, TopPair, irregular

__all__ = ["Findings", "Job", "leaf_of"]


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
    copies: bool = False  # its inputs, which the model overwrites
    apart: bool = False  # its gradient, where it must be formed, is a stand-in's: no hook of the parameter's sees it
    serves: bool = True  # its layers' products count once they have agreed; else its gradient does in every step


def leaf_of(parameter: Tensor) -> Tensor:
    """A leaf with the parameter's entries, whose gradient may have the dtypes that the parameter's may have."""
    leaf = parameter.detach().requires_grad_()
    # of PyTorch 2.10 and newer; what is made of a parameter, as a part of a bias is, has none
    allowed = getattr(parameter, "grad_dtype", parameter.dtype) if parameter.is_leaf else parameter.dtype
    if allowed != parameter.dtype:
        leaf.grad_dtype = allowed
    return leaf


class Watching:
    """Whether the loop has looked at the gradient of a parameter, after a backward in an ascent."""

    seen = False

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """The weight itself."""
        return W

    def told(self, of: str, *given: Any, **named: Any) -> None:
        """Somebody looks at its gradient, sets it, or sets ``requires_grad``."""
        self.seen |= of == "grad" and torch._C._current_graph_task_id() == -1  # in no backward, whose hooks do too


class Sums:
    """How often autograd has put a gradient into a leaf; knows nothing of it, so that both can go."""

    count = 0

    def add(self, _: Tensor) -> None:
        """Once more."""
        self.count += 1


class Findings:
    """What a pass knows about one matrix once its uses have reported."""

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
        self.frozen = job.apart or not parameter.requires_grad  # outside of the pass
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        self.was_frozen = not parameter.requires_grad  # by the loop itself
        self.thaws = self.frozen and plain and not job.apart
        self.job = job
        self.looks = Watching()
        self.iterations = iterations
        self.u = u if u.device == device else u.to(device)
        self.kept: list[Matrix] = []  # of every use that is multiplied after the pass
        self.formed: Tensor | None = None  # the gradient, of several uses
        self.waiting: LayerGradient | None = None  # the one use, small enough to be multiplied with others
        self.pair: tuple[Tensor, Tensor] | None = None  # Gv and v of the one use
        self.top: TopPair | None = None  # what they give, where they were multiplied with others: they are unit then
        self.checked: Tensor | None = None  # Gᵀr by the layers, summed over uses
        self.scale: Tensor | None = None  # Σ‖X‖‖D‖ over those uses, of which a gradient that cancels leaves rounding
        self.gradient_checked: Tensor | None = None  # Gᵀr by the gradient, where that was freed
        self.gradient_pair: TopPair | None = None  # and what it gave
        self.block = whole(shape)  # of the matrix, what the layer multiplies with here
        self.calls = 0  # uses in forwards
        self.takes = 0  # and in backwards that accumulate
        self.completed = 0  # how often autograd has put a gradient into the parameter
        self.wanted_elsewhere = False  # whether the loss itself asks for the gradient
        self.dtypes: set[torch.dtype] = set()
        self.in_pieces = False
        self.is_aside = False  # whether the loop has switched its gradient off
        self.is_overwritten = False  # whether an input of its layer was, before its backward
        self.is_altered = False  # whether a layer's function was another than torch's
        self.is_rounded = False  # or computed with far fewer digits than the matrix has
        self._bias: Tensor | None = None
        self.others_need_bias = False  # whether its gradient is formed, for another optimizer whose pass runs too
        self._stand_in: Tensor | None = None
        self._stand_ins = stand_ins  # leaves with the entries of parameters, which served uses compute with
        served = parameter.requires_grad and not job.checks and not job.keeps and not is_sharded(parameter)
        self.elsewhere = hasattr(parameter, "ds_id")  # but for the time of each use, as DeepSpeed's ZeRO 3 has it
        self.leaves: list[Tensor] = []  # of such uses
        if plain and not self.elsewhere if job.apart else served:
            self._stand_in = stand_ins[parameter] = leaf_of(parameter)
        self.sums = Sums()  # in the stand-in, where each may be a step of the base optimizer's
        if self._stand_in is not None and job.forms and job.frees:
            self._stand_in.register_post_accumulate_grad_hook(self.sums.add)  # type: ignore[no-untyped-call]
        self.has_more = False  # whether uses were seen that are not the layers'
        self._tap, self._tap_node = tap, tap_node
        self._probe: Tensor | None = None
        self.r = irregular(shape[0], device, self.u.dtype) if job.checks else None

    def forget(self) -> None:
        """Nothing has happened yet."""
        self.kept, self.formed, self.waiting, self.pair, self.top = [], None, None, None, None
        self.calls = self.takes = 0

    @property
    def tap(self) -> Tensor:
        """What an output depends on that is to be reached where autograd accumulates."""
        return self._tap

    @property
    def leaf(self) -> Tensor:
        """Where autograd puts a gradient that must be formed."""
        own = self._stand_in if self.job.apart else None
        return self.parameter if own is None else own

    @property
    def gradient(self) -> Tensor | None:
        """What has been formed of it."""
        if not self.elsewhere:
            return self.leaf.grad
        parts = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        return reduce(torch.add, parts) if parts else None

    @property
    def probed(self) -> Tensor | None:
        """What compiled uses have left."""
        return None if self._probe is None else self._probe.grad

    @property
    def would_have_a_gradient(self) -> bool:
        """Whether a backward has left one where it does in a loop by hand."""
        stand_in = self._stand_ins.get(self.parameter)
        return not self.frozen and (self.reached or (stand_in is not None and stand_in.grad is not None))

    @property
    def has_pair(self) -> bool:
        """Whether the products of a single use are here, of which no gradient can be made any more."""
        return self.pair is not None or self.is_served_in_a_graph

    @property
    def leaves_none(self) -> bool:
        """Whether the loop finds no gradient, or a part of it."""
        return not self.job.checks or self.gradient_checked is not None

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
        if len(unpacked_shape(self.parameter)) > 2 and self.u.is_cuda and self.parameter.dtype == torch.float32:
            dtypes.add(torch.float16)  # cuDNN convolves float32 in TF32 unless told otherwise, as fine as this
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
            beside = not self.job.apart and parameter.grad is not None
            own_too = own is not None or (self.elsewhere and self.gradient is not None)
            self.has_more = beside or (own_too and not self.job.forms)
        if own is not None and not self.job.apart:
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
