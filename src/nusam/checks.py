"""What is refused, each in one sentence: what was given, what is allowed, what to do."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nusam.lmo import LMO, Nuclear
from nusam.sharding import DataParallel, is_sharded

__all__ = [
    "check_base_optimizer",
    "check_choice",
    "check_count",
    "check_frozen",
    "check_m_sam",
    "check_parameter",
    "check_radius",
    "check_rank_one",
    "check_served",
    "check_sharded",
]


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
    if "rho" in base.defaults:
        raise TypeError(
            f"base_optimizer {type(base).__name__} has a hyperparameter rho of its own, which would be taken for the "
            "radius; use another base optimizer."
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


def check_choice(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_rank_one(what: str, lmo: LMO) -> None:
    """Whether an option that needs two vectors a matrix can work."""
    if not isinstance(lmo, Nuclear):
        raise ValueError(
            f"{what} needs the rank-one perturbation of NuSAM or NuSAMNorm, got {type(lmo).__name__}; leave it out."
        )


def check_served(what: str, lmo: LMO, model: Any) -> None:
    """Whether an option that works on the model's layers can work."""
    check_rank_one(what, lmo)
    if model is None:
        raise ValueError(f"{what} needs model= to reach the layers; pass the module being trained.")


def check_m_sam(m_sam: Any, lmo: LMO, workers: DataParallel) -> None:
    """Whether the processes can have perturbations of their own."""
    if m_sam and workers.must_reduce:
        raise ValueError(
            "m_sam needs an ascent that reduces no gradient, which DistributedDataParallel with static_graph=True "
            "can't leave out; use static_graph=False."
        )
    if isinstance(m_sam, bool):
        if m_sam and not (workers.replicates or workers.shards):
            raise ValueError(
                "m_sam=True needs model= to be the module wrapped by DistributedDataParallel or fully_shard, whose "
                "processes then perturb for themselves; pass it, or leave m_sam out in a single process."
            )
    elif not hasattr(m_sam, "rank"):
        raise TypeError(f"m_sam must be True, False or the process group that shares ε, got {m_sam!r}.")
    else:
        check_rank_one("m_sam=<a process group>", lmo)
        if not workers.replicates:
            raise ValueError(
                "m_sam=<a process group> needs model= to be the module wrapped by DistributedDataParallel; "
                "pass that module, or use m_sam=True."
            )


def check_parameter(parameter: Tensor, lmo: LMO, placement: str, reachable: bool) -> None:
    """Whether ``lmo``'s perturbation can be computed for the parameter, and applied to it.

    ``reachable``: whether a layer is known through which ε could live in the forward.
    """
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    quantized = not parameter.requires_grad and reachable and isinstance(lmo, Nuclear)
    if not (parameter.is_floating_point() or quantized):
        raise TypeError(f"{what} is {parameter.dtype}, only real floating point can be perturbed; set its rho to 0.")
    if is_sharded(parameter) and not lmo.sees_shards:
        raise NotImplementedError(
            f"{what} is sharded, which {type(lmo).__name__} can't see through; use NuSAM, NuSAMNorm, SAM or SAMON, or "
            "DistributedDataParallel."
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


def check_frozen(ascent: str, workers: DataParallel) -> None:
    """Whether weights without a gradient can be perturbed."""
    if ascent == "gradient":
        raise ValueError("targets='frozen' needs ascent='matrix-free' or 'auto': frozen weights have no gradient.")
    if workers.must_reduce:
        raise ValueError(
            "targets='frozen' needs a matrix-free ascent, which DistributedDataParallel with static_graph=True can't "
            "have; use static_graph=False."
        )


def check_sharded(parameter: Tensor, model: Any, m_sam: Any, workers: DataParallel, own: bool) -> None:
    """Whether a perturbed parameter that is a DTensor can be served as asked."""
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    if model is None:
        raise ValueError(f"{what} is sharded, and its module must learn when it changes; pass the module as model=.")
    if m_sam and not own:
        raise ValueError(
            f"{what} is sharded, so that its processes can have perturbations of their own from a matrix-free ascent "
            "and in the forward only; use NuSAM or NuSAMNorm with ascent and placement 'auto', or m_sam=False."
        )
    if m_sam and workers.is_tensor_parallel(parameter):
        raise NotImplementedError(f"{what} is tensor parallel, where m_sam is not available; use m_sam=False.")
