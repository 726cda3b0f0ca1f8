"""νSAM and SAM behind timm's ``--opt``: ``import nusam.integrations.timm`` registers ``nusam-adamw`` and its like.

For each of timm's base optimizers there is ``nusam-BASE``, ``nusamnorm-BASE``, ``sam-BASE`` and ``samon-BASE``. Their
keyword arguments (``--opt-kwargs`` of timm's train.py) are the base's, and those of :class:`nusam.NuSAM`::

    optimizer = timm.optim.create_optimizer_v2(model, "nusam-adamw", lr=1e-3, rho=0.05, model=model)

Weight decay, layer decay and learning rates are grouped by timm as ever. Left out are the bases that other packages
bring (``fused*``, ``bnb*``), those of second order, and Adadelta, whose own ``rho`` is something else.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nusam.methods import SAM, SAMON, NuSAM, NuSAMNorm
from nusam.sharpness_aware import Options, SharpnessAware

try:
    from timm.optim._optim_factory import default_registry
    from timm.utils.clip_grad import dispatch_clip_grad
except ImportError as error:
    raise ImportError('nusam.integrations.timm needs timm, which is not there; pip install "nusam[timm]".') from error

__all__ = ["update"]

METHODS = {"nusam": NuSAM, "nusamnorm": NuSAMNorm, "sam": SAM, "samon": SAMON}
OURS = {"rho", "power_iterations", *Options.__annotations__}


def update(
    optimizer: SharpnessAware,
    loss_scaler: Any = None,
    clip_grad: float | None = None,
    clip_mode: str = "norm",
    parameters: Iterable[Tensor] | None = None,
) -> None:
    """The optimizer's step, where timm has it behind its backward: once, when the passes are over.

    Args:
        optimizer: whose passes have left their gradients.
        loss_scaler: timm's ``NativeScaler``, if it scaled the losses (called with ``need_update=False``).
        clip_grad: what timm's ``dispatch_clip_grad`` clips to; None does not clip.
        clip_mode: ``"norm"``, ``"value"`` or ``"agc"``.
        parameters: whose gradients are clipped; by default the optimizer's.
    """
    scaler = None if loss_scaler is None else loss_scaler._scaler
    if clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        if parameters is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


class _Defaults(dict[str, Any]):
    """Defaults that notice timm's Lookahead, whose constructor adds its own to those of what it wraps."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "The prefix lookahead_ would wrap timm's Lookahead around our optimizer and hide its passes; wrap it the "
            "other way round, nusam.NuSAM(timm.optim.create_optimizer_v2(model, 'lookahead_adamw'), model=model)."
        )


def _build(
    kind: Callable[..., SharpnessAware], base: Callable[..., Optimizer], params: Any, **options: Any
) -> SharpnessAware:
    """The method around timm's base optimizer, as timm's registry calls it."""
    ours = {name: options.pop(name) for name in OURS & options.keys()}
    optimizer = kind(base(params, **options), **ours)
    optimizer.base_optimizer.defaults = _Defaults(optimizer.base_optimizer.defaults)
    return optimizer


def _register() -> None:
    registry: Any = default_registry
    for base in registry.list_optimizers():
        info = registry.get_optimizer_info(base)
        if isinstance(info.opt_class, str) or info.second_order or base == "adadelta" or "-" in base:
            continue
        for prefix, kind in METHODS.items():
            named = dataclasses.replace(
                info,
                name=f"{prefix}-{base}",
                opt_class=partial(_build, kind, info.opt_class),
                description=f"{kind.__name__} around {base}: {info.description}",
            )
            registry.register(named)


_register()
