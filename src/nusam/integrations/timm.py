"""νSAM and SAM behind timm's ``--opt``: ``import nusam.integrations.timm`` registers ``nusam-adamw`` and its like.

For each of timm's base optimizers there is ``nusam-BASE``, ``nusamnorm-BASE``, ``sam-BASE`` and ``samon-BASE``. Their
keyword arguments (``--opt-kwargs`` of timm's train.py) are the base's, and those of :class:`nusam.NuSAM`::

    optimizer = timm.optim.create_optimizer_v2(model, "nusam-adamw", lr=1e-3, rho=0.05, model=model)

Weight decay, layer decay and learning rates are grouped by timm as ever. Left out are the bases that other packages
bring (``fused*``, ``bnb*``), those of second order, and Adadelta, whose own ``rho`` is something else.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from nusam.methods import SAM, SAMON, NuSAM, NuSAMNorm
from nusam.optimizer import Options, SharpnessAware

try:
    from timm.optim._optim_factory import default_registry
    from timm.utils.clip_grad import dispatch_clip_grad
except ImportError as error:
    raise ImportError('nusam.integrations.timm needs timm, which is not there; pip install "nusam[timm]".') from error

__all__ = ["update"]

METHODS = {"nusam": NuSAM, "nusamnorm": NuSAMNorm, "sam": SAM, "samon": SAMON}
OURS = {"rho", "power_iterations", "convolutions", *Options.__annotations__}


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


class _OfTimm(type):
    """Of the classes that timm's registry holds, what each of them constructs being the method itself."""

    method: type[SharpnessAware]
    base: type[Optimizer]

    def __instancecheck__(cls, instance: Any) -> bool:
        if "base" not in vars(cls):  # a class derived from one of them
            return super().__instancecheck__(instance)
        return isinstance(instance, cls.method) and type(instance.base_optimizer) is cls.base


@cache
def _class(method: type[SharpnessAware], base: type[Optimizer]) -> type[Optimizer]:
    """The method around timm's base optimizer, as a class that is constructed like the base's.

    It stands in this module under its name, so that it can be pickled.
    """

    def parts(params: Any, *args: Any, **options: Any) -> tuple[Optimizer, dict[str, Any]]:
        ours = {name: options.pop(name) for name in OURS & options.keys()}
        return base(params, *args, **options), ours

    def new(cls: type, *args: Any, **options: Any) -> Any:
        if cls is not made:
            return object.__new__(cls)
        optimizer, ours = parts(*args, **options)
        return method(optimizer, **ours)

    def init(self: Any, *args: Any, **options: Any) -> None:
        optimizer, ours = parts(*args, **options)
        method.__init__(self, optimizer, **ours)

    name = f"{method.__name__}{base.__name__}"
    while name in globals():
        name += "_"
    own = {"__new__": new, "__init__": init, "__module__": __name__, "method": method, "base": base}
    made = _OfTimm(name, (method,), {**own, "__doc__": f"{method.__name__} around {base.__name__}."})
    globals()[name] = made
    return cast(type[Optimizer], made)


def _refusing(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """timm's factory, which reads what precedes an underscore as the name of a wrapper."""

    @wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **options: Any) -> Optimizer:
        *wrappers, name = opt.lower().split("_")
        method, _, base = name.partition("-")
        if wrappers and method in METHODS and base:
            raise TypeError(
                f"The prefix {wrappers[0]}_ would wrap timm's {wrappers[0].title()} around our optimizer and hide its "
                "passes; wrap it the other way round, nusam.NuSAM(timm.optim.create_optimizer_v2(model, "
                f"'{wrappers[0]}_{base}'), model=model)."
            )
        ours = next((wrapper for wrapper in wrappers if wrapper in METHODS), None)
        if ours is not None:
            raise ValueError(f"opt={opt!r} is {name} alone to timm, which drops {ours}_; write {ours}-{name}.")
        return create(model_or_params, opt, *args, **options)

    return create_optimizer


def _register() -> None:
    registry: Any = default_registry
    for base in registry.list_optimizers():
        info = registry.get_optimizer_info(base)
        if isinstance(info.opt_class, str) or info.second_order or base == "adadelta" or "-" in base:
            continue
        for prefix, method in METHODS.items():
            named = dataclasses.replace(
                info,
                name=f"{prefix}-{base}",
                opt_class=_class(method, info.opt_class),
                description=f"{method.__name__} around {base}: {info.description}",
            )
            registry.register(named)
    registry.create_optimizer = _refusing(registry.create_optimizer)


_register()
