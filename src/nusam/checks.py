"""What is refused, each in one sentence: what was given, what is allowed, what to do."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nusam.lmo import LMO, Nuclear

__all__ = ["check_base_optimizer", "check_choice", "check_count", "check_parameter", "check_radius"]


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


def check_count(what: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} must be a whole number of at least 0, got {value!r}.")


def check_choice(what: str, value: Any, allowed: tuple[Any, ...], later: tuple[Any, ...]) -> None:
    if value in later:
        raise NotImplementedError(f"{what}={value!r} is not available yet; use {what}={allowed[0]!r}.")
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_parameter(parameter: Tensor, lmo: LMO, placement: str) -> None:
    """Whether ``lmo``'s perturbation can be added to the parameter, and computed from its gradient."""
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    if not parameter.is_floating_point():
        raise TypeError(f"{what} is {parameter.dtype}, only real floating point can be perturbed; set its rho to 0.")
    if hasattr(parameter, "device_mesh"):
        raise NotImplementedError(
            f"{what} is a DTensor, and sharded parameters are not supported yet; use DistributedDataParallel."
        )
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise TypeError(f"{what} has a sparse gradient, only dense ones are supported; use sparse=False or rho=0.")
    if parameter.dtype.itemsize < 4 and placement == "auto" and isinstance(lmo, Nuclear):
        raise NotImplementedError(
            f"{what} is {parameter.dtype}, and adding a rank-one ε to weights below float32 rounds most of it away; "
            "keep the weights in float32 and use autocast, or accept the rounding with placement='weights'."
        )
