"""Who shares the batch: under DDP and FSDP2 a gradient is the sum of what the processes computed."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nusam.distributed.blocks import Block, averaged, block, complete, groups_of, is_sharded, whole
from nusam.distributed.engines import Engine, is_engine
from nusam.distributed.holding import Holding
from nusam.distributed.sums import Group, Ranks, Route
from nusam.interrupts import always
from nusam.lmo import matrix_shape

__all__ = ["DataParallel", "Forced", "is_running", "is_stateless", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that wrappers (DistributedDataParallel, torch.compile) stand for, with its own names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel) or is_engine(model):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class Forced(NamedTuple):
    """What makes every pass reduce every gradient, and what to do where that can't be borne."""

    why: str
    instead: str


class DataParallel:
    """How the model's processes share the batch, as far as its wrappers tell.

    Made anew whenever it is asked, since models are wrapped late and change on the way, so making one costs little.

    Args:
        model: the module being trained, or None.
        m_sam: True if every process has an ε of its own, False if all share one, or the group that shares one.
    """

    def __init__(self, model: nn.Module | None, m_sam: Any = False) -> None:
        self._model = model
        self._m_sam = m_sam
        self._ddps: list[Any] = []
        self._fsdp: list[Any] = []
        self._composed: list[Any] = []  # what replicate() knows of the modules it was applied to
        self.engine: Engine | None = None
        self.is_in_a_stage = False  # whether a pipeline runs the backwards of what DDP wraps
        if model is not None and is_engine(model):
            self.engine = Engine(model)
        elif model is not None and is_running():
            self._ddps, self._fsdp, self._composed = _wrappers(model)
        self._holding = Holding(self._ddps, self._fsdp)

    @property
    def splits_the_batch(self) -> bool:
        """Whether ε is shared by processes that see different samples."""
        return (self.replicates or self.shards) and self._m_sam is not True

    @property
    def shards(self) -> bool:
        """Whether FSDP2 is at work."""
        return bool(self._fsdp)

    @property
    def replicates(self) -> bool:
        """Whether DistributedDataParallel is at work, or an engine that does the same."""
        return bool(self._ddps or self._composed) or self.engine is not None

    @property
    def must_reduce(self) -> bool:
        """Whether every gradient is reduced in every pass, so that the ascent works by gradients."""
        return self.forced is not None

    @property
    def why_it_must_reduce(self) -> str:
        """What makes :attr:`must_reduce` true; empty if nothing does."""
        return "" if self.forced is None else self.forced.why

    @property
    def forced(self) -> Forced | None:
        """What makes :attr:`must_reduce` true, if anything does."""
        if self._composed:
            return Forced("replicate() makes DDP reduce every gradient", "DistributedDataParallel")
        if any(ddp.static_graph for ddp in self._ddps):
            return Forced("DDP with static_graph=True reduces every gradient", "static_graph=False")
        if any(ddp.mixed_precision is not None for ddp in self._ddps):
            return Forced(
                "DDP with mixed_precision= has its weights back only where it reduces gradients", "torch.autocast"
            )
        if self.is_in_a_stage:
            return Forced("a pipeline makes DDP reduce every gradient of its stage", "fully_shard inside the stage")
        if self.joins and self._m_sam is not True:
            return Forced(
                "in DDP.join() the processes that are through answer DDP's own communication alone", "even inputs"
            )
        if any(getattr(group, "reduce_scatter_unused_params", False) for group in self._holding.fsdp_groups()):
            return Forced(
                "fully_shard with set_reduce_scatter_unused_params(True) reduces every gradient", "its default, False"
            )
        return None

    @property
    def joins(self) -> bool:
        """Whether a process may run out of batches before others: from DDP.join() on, also after it."""
        return any(ddp._join_config.enable for ddp in self._ddps)

    @property
    def join(self) -> tuple[object, ...]:
        """What changes whenever DDP.join() is entered, and when it is first left."""
        return tuple((id(ddp._join_config), vars(ddp).get("_authoritative_rank")) for ddp in self._ddps if self.joins)

    def refuse_frozen(self, parameters: Iterable[Tensor]) -> None:
        """Refuse parameters without a gradient, where only gradients can serve."""
        for parameter in parameters:
            if self.forced is not None and not parameter.requires_grad:
                raise RuntimeError(
                    f"A perturbed parameter of shape {tuple(parameter.shape)} is frozen and needs a matrix-free "
                    f"ascent, but {self.forced.why}; use {self.forced.instead}, or exclude it with targets=."
                )

    def is_tensor_parallel(self, parameter: Tensor) -> bool:
        """Whether the parameter's layer computes with a block of it."""
        if not is_sharded(parameter):
            return False
        managed = self._holding.managed.get(parameter)
        return managed is None or managed.parameter.is_dtensor

    def is_own(self, parameter: Tensor) -> bool:
        """Whether the parameter is this process's own, though others share the batch: no wrapper holds it."""
        if len(self._ddps) < len(self._composed):  # replicate() takes its parameters in the first forward
            return False
        return self._holding.is_own(parameter)

    def block(self, parameter: Any, in_layer: bool) -> Block:
        """Which block of a matrix is here: of what its layer computes with, or as the optimizer holds it."""
        if not is_sharded(parameter) or (in_layer and not self.is_tensor_parallel(parameter)):
            return whole(matrix_shape(parameter))
        if in_layer and parameter in self._holding.managed:
            managed = self._holding.managed[parameter].parameter
            spec = getattr(managed, "_unsharded_dtensor_spec", None) or managed._tp_spec  # the latter before torch 2.10
            return block(SimpleNamespace(device_mesh=spec.mesh, placements=spec.placements, shape=spec.shape))
        return block(parameter)

    def summands(self, parameter: Tensor) -> tuple[Group, ...]:
        """The groups whose processes each hold a summand of the parameter's gradient if nobody reduces it."""
        if self._m_sam is True:
            return ()
        groups = self._holding.groups_of(parameter) if self.engine is None else self.engine.groups
        return groups if self._m_sam is False or not groups else (self._m_sam,)

    def averaged(self, part: Block, parameter: Tensor) -> Block:
        """A block of which every process that shares the batch has a summand, for the sum as its wrapper scales it."""
        groups, divisor = self.summands(parameter), self._holding.divisor_of(parameter)
        if not groups or divisor is None:
            return averaged(part, groups)
        return averaged(part, groups)._replace(share=part.share / divisor)

    def everyone(self, parameters: Iterable[Any]) -> Route:
        """All that run the same passes: who shares the batch, and who holds other parts of the parameters."""
        groups = self._holding.groups if self.engine is None else self.engine.groups
        meshes = dict.fromkeys(parameter.device_mesh for parameter in parameters if is_sharded(parameter))
        return Route(tuple(dict.fromkeys([*groups, *(group for mesh in meshes for group in groups_of(mesh))])))

    def reduces_gradients(self, matrix_free: bool) -> bool:
        """Whether the ascent's gradients come averaged over the processes that split the batch.

        Hooks that stand in for DDP's reduction may have a state (PowerSGD's error feedback) that an ascent must not
        move, so that gradients are reduced without them.
        """
        around_hooks = not self.must_reduce and any(ddp._comm_hooks for ddp in self._ddps)
        return self._m_sam is False and not matrix_free and not around_hooks

    @torch.no_grad()
    def average(self, parameters: Sequence[Tensor]) -> None:
        """Replace gradients that nobody has reduced by their means over processes; a missing one counts as zeros.

        Where DDP looks for unused parameters itself, those that no process used keep having no gradient.
        """
        unused = [self._unused(p) for p in parameters] if any(d.find_unused_parameters for d in self._ddps) else []
        gradients = [complete(parameter.grad, parameter) for parameter in parameters]
        parts = [self.averaged(Block(p.shape, slice(0), slice(0), Route()), p) for p in parameters]
        ranks = Ranks([part.route for part in parts])
        ranks.sum_(gradients)
        if unused:
            ranks.max_(unused)
        nobody = [x < 0 for x in torch.stack(unused).tolist()] if unused else [False] * len(gradients)
        for parameter, gradient, part, missing in zip(parameters, gradients, parts, nobody, strict=True):
            parameter.grad = None if missing else gradient.mul_(part.share)

    @staticmethod
    def _unused(parameter: Tensor) -> Tensor:
        return torch.tensor(-1.0 if parameter.grad is None else 1.0, device=parameter.device)

    @contextmanager
    def ascent(self, reduces: bool) -> Iterator[None]:
        """The ascent pass, in which DDP reduces gradients or leaves each process its own, as told."""
        hook = None
        if self.engine is None and not self._ddps and self._model is not None and not reduces and is_running():
            hook = self._model.register_forward_pre_hook(_refuse_unknown_ddp)
        before = [(ddp, ddp.require_forward_param_sync) for ddp in self._ddps]

        def undo() -> None:
            if hook is not None:
                hook.remove()
            for ddp, broadcasts in before:
                if not ddp._join_config.enable:  # where processes that are through go by what DDP made of it
                    ddp.require_forward_param_sync = broadcasts  # of buffers, in the descent as in the ascent

        with always(undo), nullcontext() if self.engine is None else self.engine.ascent(), self.reducing(reduces):
            yield

    @contextmanager
    def reducing(self, reduces: bool = True) -> Iterator[None]:
        """A pass in which DDP reduces gradients or leaves each process its own, as told, whatever ``no_sync`` says."""
        before = [(ddp, ddp.require_backward_grad_sync) for ddp in self._ddps]

        def undo() -> None:
            for ddp, syncs in before:
                ddp.require_backward_grad_sync = syncs
                vars(ddp).pop("no_sync", None)

        with always(undo):
            for ddp in self._ddps:
                ddp.require_backward_grad_sync = reduces
                if reduces:
                    vars(ddp)["no_sync"] = nullcontext  # for loops that enter it inside of the pass
            yield

    def stored(self, parameter: Tensor) -> Tensor:
        """The parameter as the optimizer holds it, of what stands in its module."""
        return self._holding.stored.get(parameter, parameter)

    def kept(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient to be set aside: DDP's may be views of buckets that the ascent overwrites."""
        views = any(ddp.gradient_as_bucket_view for ddp in self._ddps)
        return gradient.clone() if views and gradient is not None else gradient

    def reshard(self) -> None:
        """Put the stored parameters back in their modules, and forget gathered ones: weights may have changed since.

        FSDP2 leaves gathered ones there after an evaluation, and when told not to reshard.
        """
        for module in self._fsdp:
            module.reshard()

    def refuse_unreduced(self) -> None:
        """Refuse what the passes can't be run under.

        The ways of FSDP2 and replicate() to accumulate without communication leave gradients that the passes can't tell
        apart.
        """
        reduced = all(group.reduce_grads and group.all_reduce_grads for group in self._holding.fsdp_groups())
        if not reduced or any(state._no_sync for state in self._composed):
            raise RuntimeError(
                "set_requires_gradient_sync(False), like set_requires_all_reduce(False), keeps gradients where the "
                "ascent can't be told from the descent; leave it True, and accumulate with "
                "opt.passes(accumulate=True)."
            )
        if self.forced is None:
            return
        if self._m_sam is not False:
            raise RuntimeError(
                f"m_sam needs an ascent that reduces no gradient, but {self.forced.why}; use {self.forced.instead}."
            )
        for ddp in self._ddps:
            if not all(is_stateless(*registered) for registered in ddp._comm_hooks) and ddp.mixed_precision is None:
                raise RuntimeError(
                    "A communication hook of DistributedDataParallel may have a state that the ascent must not move, "
                    f"but {self.forced.why}; use {self.forced.instead}, or leave the hook out."
                )


def _wrappers(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """The DDPs and the modules of FSDP2 in the model, and what replicate() knows of those it was applied to.

    A walk of its own, several times faster than ``modules()``.
    """
    if isinstance(model, DistributedDataParallel):
        return [model], [], []
    lists: tuple[list[Any], list[Any], list[Any]] = [], [], []
    list_of: dict[type, list[Any] | None] = {}
    composing: Any = sys.modules.get("torch.distributed._composable.replicate")
    composed = getattr(composing, "DDP", ())
    found = {model}
    left = [model]
    while left:
        module = left.pop()
        kind = type(module)
        if kind not in list_of:
            sharded = hasattr(kind, "_get_fsdp_state") and hasattr(kind, "reshard")
            is_ddp = issubclass(kind, DistributedDataParallel)
            list_of[kind] = (
                lists[0] if is_ddp else lists[1] if sharded else lists[2] if issubclass(kind, composed) else None
            )
        wrappers = list_of[kind]
        if wrappers is not None:
            wrappers.append(module)
        for child in module._modules.values():
            if child is not None and child not in found:
                found.add(child)
                left.append(child)
    states = [composing.replicate.state(module) for module in lists[2]]
    return [*lists[0], *(state._ddp for state in states if state.has_initialized)], lists[1], states


def is_stateless(hook: Any, state: Any) -> bool:
    """Whether a communication hook is one of torch's own that remember nothing."""
    own = getattr(hook, "__module__", "").startswith("torch.distributed.algorithms.ddp_comm_hooks.")
    return own and (state is None or isinstance(state, dist.ProcessGroup))


def is_running() -> bool:
    """Whether several processes may work together."""
    return dist.is_available() and dist.is_initialized()


def _refuse_unknown_ddp(*_: Any) -> None:
    if DistributedDataParallel._active_ddp_module is not None:
        DistributedDataParallel._active_ddp_module = None  # which replicate() leaves set where a forward raises
        raise RuntimeError(
            "The model given as model= runs inside DistributedDataParallel, which a matrix-free ascent must know of; "
            "pass the wrapped module as model=."
        )
