"""νSAM in a loop on Hugging Face's accelerate, whose wrapper around an optimizer hides ``passes()``::

    model, opt, loader = accelerator.prepare(model, opt, loader)
    for x, y in loader:
        with accelerator.accumulate(model):
            for xs, ys in passes(opt, model, x, y):
                accelerator.backward(criterion(model(xs), ys))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()

``save_state`` and ``load_state`` need nothing. A closure is refused once a scaler is at work (fp16).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.optim import Optimizer

from nusam.optimizer import SharpnessAware

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
except ImportError as error:
    raise ImportError(
        'nusam.integrations.accelerate needs accelerate, which is not there; pip install "nusam[accelerate]".'
    ) from error

__all__ = ["passes", "sharpness_aware"]

REDUCES_IN_STEP = {DistributedType.XLA, DistributedType.MEGATRON_LM}


def passes(optimizer: Optimizer, model: nn.Module, *batch: Any) -> Iterator[Any]:
    """The passes over one micro-batch, :meth:`nusam.SharpnessAware.passes` with ``accumulate=True``.

    Call ``zero_grad()`` once a step, as accelerate asks for anyway. Every micro-batch is perturbed on its own.

    Args:
        optimizer: a :class:`nusam.SharpnessAware`, as ``Accelerator.prepare`` gave it back.
        model: as ``Accelerator.prepare`` gave it back. If the optimizer was built with ``model=``, it learns here by
            what that model is wrapped now, so that under DDP all processes share one perturbation.
        batch: what comes back once a pass, in the ascent cut to ``ascent_share``; without any the passes' names come.

    Raises:
        TypeError: if the optimizer is none of nusam's.
        NotImplementedError: under FSDP1, DeepSpeed and Megatron-LM, and on several XLA devices.
    """
    opt = reaching(optimizer, model)
    yield from opt.passes(*batch, accumulate=True)


def reaching(optimizer: Optimizer, model: nn.Module) -> SharpnessAware:
    """nusam's optimizer, which knows from now on by what ``Accelerator.prepare`` has wrapped its model.

    Raises:
        TypeError, NotImplementedError: as :func:`passes`.
    """
    opt = sharpness_aware(optimizer)
    is_sharded = isinstance(model, (FSDPModule, FullyShardedDataParallel))
    inner = model if is_sharded else getattr(model, "_orig_mod", model)  # what torch.compile wraps
    launch = optimizer.accelerator_state if isinstance(optimizer, AcceleratedOptimizer) else None
    if launch is not None and launch.distributed_type in REDUCES_IN_STEP and launch.num_processes > 1:
        raise NotImplementedError(
            f"accelerate adds up the gradients of {launch.distributed_type.value} processes in step() alone, behind "
            "the passes; use DDP or FSDP2 on devices that torch.distributed reaches, or a single process."
        )
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise NotImplementedError(
            "DeepSpeed steps inside its backward and keeps gradients where the two passes can't reach them; use DDP, "
            "or FSDP2 (fsdp_version=2 in accelerate's configuration)."
        )
    if isinstance(inner, FullyShardedDataParallel):
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) keeps gradients where the two passes can't reach them; use FSDP2, "
            "fsdp_version=2 in accelerate's configuration."
        )
    if opt.model is not None and opt.model is not model:
        opt.model = model
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(True)  # what accumulate() leaves unreduced could not be told apart
        _forget_replaced(opt)
    return opt


def sharpness_aware(optimizer: Optimizer) -> SharpnessAware:
    """nusam's optimizer behind accelerate's wrapper, for ``metrics()``, ``active`` and ``rho``.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, SharpnessAware):
        raise TypeError(
            f"optimizer must be one of nusam's, got {type(inner).__name__}; wrap it before Accelerator.prepare, "
            "nusam.NuSAM(optimizer, model=model)."
        )
    return inner


def _forget_replaced(opt: SharpnessAware) -> None:
    """Let go of the whole parameters, which Accelerator.prepare shards after the optimizer was built."""
    held = {*opt._parameters(), *opt._outside().values()}
    for parameter in opt._states.keys() - held:
        del opt._states[parameter]
    opt.__dict__.pop("_normalization", None)  # SAMON's choice among them
