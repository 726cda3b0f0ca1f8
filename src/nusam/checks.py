"""What is refused, each in one sentence: what was given, what is allowed, what to do."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nusam.lmo import LMO, Nuclear

__all__ = ["check_base_optimizer", "check_choice", "check_count", "check_parameter", "check_radius", "check_served"]


def check_base_optimizer(base: Any) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"base_optimizer must be an optimizer, got the class {base.__name__}; construct it first, "
            f"{base.__name__}(model.parameters(), ...)."
        )
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}.")
    if hasattr(base, "base_optimizer"):
        raise TypeError(
            f"base_optimizer is a {type(base).__name__}, itself a wrapper; wrap its base_optimizer instead."
        )
    if isinstance(base, LBFGS):
        raise TypeError(
            "base_optimizer LBFGS evaluates its closure several times a step, which two passes can't serve; "
            "use a first-order optimizer."
        )


def check_radius(value: Any, what: str = "rho") -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a finite number of at least 0, got {value!r}.")


def check_count(what: str, value: Any, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}.")


def check_choice(what: str, value: Any, allowed: tuple[Any, ...], later: tuple[Any, ...] = ()) -> None:
    if value in later:
        raise NotImplementedError(f"{what}={value!r} is not available yet; use {what}={allowed[0]!r}.")
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_served(what: str, lmo: LMO, model: Any) -> None:
    """Whether an option that works on the model's layers can work."""
    if not isinstance(lmo, Nuclear):
        raise ValueError(
            f"{what} needs the rank-one perturbation of NuSAM or NuSAMNorm, got {type(lmo).__name__}; leave it out."
        )
    if model is None:
        raise ValueError(f"{what} needs model= to reach the layers; pass the module being trained.")


def check_parameter(parameter: Tensor, lmo: LMO, placement: str, reachable: bool) -> None:
    """Whether ``lmo``'s perturbation can be computed for the parameter, and applied to it.

    ``reachable``: whether a layer is known through which ε could live in the forward.
    """
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    if not parameter.is_floating_point():
        raise TypeError(f"{what} is {parameter.dtype}, only real floating point can be perturbed; set its rho to 0.")
    if hasattr(parameter, "device_mesh"):
        raise NotImplementedError(
            f"{what} is a DTensor, and sharded parameters are not supported yet; use DistributedDataParallel."
        )
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise TypeError(f"{what} has a sparse gradient, only dense ones are supported; use sparse=False or rho=0.")
    rank_one = isinstance(lmo, Nuclear)
    if not parameter.requires_grad and not (rank_one and reachable):
        raise ValueError(
            f"{what} is frozen and has no gradient, and no known layer can serve it; exclude it with targets=."
        )
    if placement == "forward" and not reachable:
        raise ValueError(
            f"{what} has no known layer in whose forward ε could live; exclude it with targets= or use "
            "placement='weights'."
        )
    if parameter.dtype.itemsize < 4 and placement == "auto" and rank_one and not reachable:
        raise ValueError(
            f"{what} is {parameter.dtype}, and adding a rank-one ε to weights below float32 rounds most of it away; "
            "pass model= so that ε can live in its layer's forward, keep the weights in float32 and use autocast, or "
            "accept the rounding with placement='weights'."
        )
