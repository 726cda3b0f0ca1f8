"""What is refused, each in one sentence: what was given, what is allowed, what to do."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from nusam.base_optimizer import chain, is_second_order, moves_first, unknown_argument
from nusam.combinations import Combination
from nusam.directions import Direction
from nusam.distributed.data_parallel import DataParallel, is_running, is_stateless
from nusam.distributed.surroundings import Holders
from nusam.guards.calls import check_kind
from nusam.guards.weights import check_frozen
from nusam.lmo import LMO, Nuclear

__all__ = [
    "check_alone",
    "check_base_optimizer",
    "check_between",
    "check_both",
    "check_choice",
    "check_closure",
    "check_count",
    "check_join",
    "check_m_sam",
    "check_sharpness_aware",
    "check_model",
    "check_options",
    "check_radius",
    "check_rank_one",
    "check_served",
    "check_steps",
    "check_surroundings",
    "check_tracking",
]


def check_closure(base: Optimizer, missing: bool) -> None:
    """Whether the base gets the closure without which it can't step."""
    if missing:
        raise RuntimeError(
            f"base_optimizer {type(base).__name__} can't step without a closure, from which it takes the loss; call "
            "opt.step(closure), which runs the passes itself."
        )


def check_tracking() -> None:
    """Whether backwards can run here at all."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "The passes run inside torch.inference_mode(), in which no backward can run; leave it for them."
        )


def check_alone(base: Optimizer) -> None:
    """Whether the base is all that steps, so that it can be handed one parameter at a time."""
    if len(list(chain(base))) > 1:
        raise TypeError(
            f"step_in_backward() steps one parameter at a time, which base_optimizer {type(base).__name__} could not "
            "hand on to the optimizer that it wraps; wrap that one instead."
        )


def check_options(
    lmo: Any,
    delay: Any,
    rho_schedule: Any,
    model: Any,
    targets: Any,
    ascent: Any,
    placement: Any,
    m_sam: Any,
    ascent_share: Any,
    seed: Any,
) -> None:
    """Whether a method's arguments are ones that it takes, and can be had together."""
    if not isinstance(lmo, LMO):
        raise TypeError(f"lmo must be a norm ball from nusam.lmo, such as nusam.lmo.Nuclear(), got {lmo!r}.")
    check_count("delay", delay)
    check_count("seed", seed)
    check_share(ascent_share)
    check_schedule(rho_schedule)
    check_module(model)
    if not callable(targets):
        instead = "; to choose by name pass a predicate (name, parameter) -> bool"
        check_choice("targets", targets, ("trainable", "frozen"), instead)
    check_choice("ascent", ascent, ("auto", "gradient", "matrix-free"))
    check_choice("placement", placement, ("auto", "weights", "forward"))
    check_m_sam(m_sam, lmo, DataParallel(model, m_sam))
    if targets == "frozen":
        check_served("targets='frozen'", lmo, model)
        check_frozen(ascent, DataParallel(model))
    elif targets != "trainable" and model is None:
        raise ValueError("A predicate for targets needs model= for the names; pass the module being trained.")
    if ascent == "matrix-free":
        check_served("ascent='matrix-free'", lmo, model)
    if placement == "forward":
        check_served("placement='forward'", lmo, model)


def check_steps(lmo: LMO, direction: Any, combination: Any, m_sam: Any) -> None:
    """Whether a direction and a combination go with the ball."""
    if not isinstance(direction, Direction | None):
        raise TypeError(f"direction must be one from nusam.directions, or None, got {direction!r}.")
    if not isinstance(combination, Combination | None):
        raise TypeError(f"combination must be one from nusam.combinations, or None, got {combination!r}.")
    given = "direction=" if direction is not None else "combination=" if combination is not None else ""
    if given and isinstance(lmo, Nuclear):
        raise ValueError(
            f"{given} needs gradients that the ascent of {type(lmo).__name__} does not form; use a ball with a dense "
            "ε, such as nusam.lmo.L2()."
        )
    if combination is not None and m_sam is not False:
        raise ValueError(
            "combination= would mix a gradient of this process with one of all, as m_sam leaves them; use m_sam=False."
        )


def check_both(method: str, combination: Combination | None, share: float) -> None:
    """Whether the gradients that a combination mixes are of the same samples."""
    if combination is not None and share < 1:
        raise ValueError(
            f"{method} mixes the gradients of both passes, which must be of the same samples, got "
            f"ascent_share={share:g}; use ascent_share=1, or a method that steps with the second alone, such as SAM."
        )


def check_sharpness_aware(method: Any) -> None:
    """Whether a framework can hand its optimizer to it."""
    if isinstance(method, Optimizer) or not callable(method):
        raise TypeError(
            "sharpness_aware must be a method, such as functools.partial(nusam.NuSAM, rho=0.02), to which the "
            f"framework's optimizer is handed, got {method!r}."
        )


def check_module(model: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be the torch.nn.Module being trained, or None, got {type(model).__name__}.")


def check_model(model: nn.Module | None, parameters: Sequence[Tensor]) -> None:
    """Whether the module is the one that is trained."""
    if model is not None and parameters and {*model.parameters()}.isdisjoint(parameters):
        raise ValueError(
            f"model= is a {type(model).__name__} that holds no parameter of base_optimizer; pass the module that is "
            "trained."
        )


def check_base_optimizer(base: Any) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"base_optimizer must be an optimizer, got the class {base.__name__}; construct it first, "
            f"{base.__name__}(model.parameters(), ...)."
        )
    check_kind(base)
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__}.")
    inside = list(chain(base))
    for one in inside:
        if hasattr(one, "base_optimizer"):
            raise TypeError(
                f"base_optimizer is a {type(one).__name__}, itself a wrapper; wrap its base_optimizer instead."
            )
    if not all(isinstance(getattr(one, "defaults", None), dict) for one in inside):
        raise TypeError(
            f"base_optimizer {type(base).__name__} has no defaults, which every torch.optim.Optimizer has; wrap the "
            "optimizer inside it instead."
        )
    if any(is_lazy(parameter) for group in base.param_groups for parameter in group["params"]):
        raise ValueError("base_optimizer holds a lazy layer's parameter, not shaped yet; run the model once before it.")
    if any("rho" in one.defaults for one in inside):
        raise TypeError(
            f"base_optimizer {type(base).__name__} has a hyperparameter rho of its own, which would be taken for the "
            "radius; use another base optimizer."
        )
    if is_second_order(base):
        raise TypeError(
            f"base_optimizer {type(base).__name__} differentiates its gradients a second time, which the passes do not "
            "prepare; use a first-order optimizer."
        )
    unknown = unknown_argument(base)
    if unknown is not None:
        raise TypeError(
            f"base_optimizer {type(base).__name__} has a step() that needs {unknown!r}, and can be given a closure at "
            "most; use another base optimizer."
        )
    if moves_first(base):
        raise TypeError(
            f"base_optimizer {type(base).__name__} moves the weights before it calls its closure, where the passes "
            "have found no gradient; use another base optimizer."
        )
    if any(hasattr(one, "fused_backward") for one in inside):
        raise TypeError(
            f"base_optimizer {type(base).__name__} moves the weights inside its backward, which the ascent would run "
            "into; use another base optimizer and nusam.step_in_backward."
        )
    if any(isinstance(one, LBFGS) for one in inside):
        raise TypeError(
            "base_optimizer LBFGS evaluates its closure several times a step, which two passes can't serve; "
            "use a first-order optimizer."
        )


def check_radius(value: Any, what: str = "rho") -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a finite number of at least 0, got {value!r}.")
    if float(value) > 1e30:
        raise ValueError(f"{what} must be at most 1e30, which float32 can still be multiplied with, got {value!r}.")


def check_schedule(schedule: Any) -> None:
    if schedule is not None and not callable(schedule):
        raise TypeError(f"rho_schedule must map a step to a factor on rho, or be None, got {schedule!r}.")


def check_between(what: str, value: Any, least: float, most: float, *, low: bool, high: bool) -> None:
    """``low`` and ``high``: whether the ends belong to it."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and least <= value <= most and (low or value != least) and (high or value != most):
        return
    ends = f"{'[' if low else '('}{least:g}, {most:g}{']' if high else ')'}"
    raise ValueError(f"{what} must be a number in {ends}, got {value!r}.")


def check_share(share: Any, what: str = "ascent_share") -> None:
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
        raise ValueError(f"{what} must be a number above 0 and at most 1, got {share!r}.")


def check_batch(batch: tuple[Any, ...], share: float) -> None:
    """What the passes are to go over, before one begins."""
    if not batch and share < 1:
        raise ValueError(
            f"passes() without a batch can't give the ascent a share of it, ascent_share={share:g}; write "
            "'for x, y in opt.passes(x, y):', or use ascent_share=1."
        )
    if batch and isinstance(batch[-1], bool):
        before = "..., " if len(batch) > 1 else ""
        raise TypeError(
            f"passes({before}{batch[-1]}) would take {batch[-1]} for a part of the batch; write "
            f"passes({before}accumulate={batch[-1]})."
        )


def check_count(what: str, value: Any, least: int = 0) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}.")


def check_choice(what: str, value: Any, allowed: tuple[Any, ...], instead: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}{instead}.")


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
    if m_sam and workers.forced is not None:
        raise ValueError(
            f"m_sam needs an ascent that reduces no gradient, but {workers.forced.why}; use {workers.forced.instead}."
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


def check_surroundings(
    parameters: Sequence[Tensor], model: Any, lmo: LMO, workers: DataParallel, holders: Holders, mixes: bool = False
) -> None:
    """Whether what wraps the parameters, as far as it is there yet, leaves the passes what they need.

    ``mixes``: whether a combination mixes both gradients in the pass that begins.
    """
    if not is_running():
        return
    if holders.flatten(parameters, model):
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) keeps gradients where the two passes can't reach them; use fully_shard "
            "(FSDP2)."
        )
    several = dist.get_world_size() > 1
    stages = several and (lmo.joint or workers.replicates)
    for holder in holders.of(parameters, stages, several and not (workers.replicates or workers.shards)):
        if isinstance(holder, DistributedDataParallel):
            if not all(is_stateless(*registered) for registered in holder._comm_hooks):
                raise RuntimeError(
                    "DistributedDataParallel has a communication hook, whose state the ascent must not move, and "
                    "model= does not show it; pass the wrapped module as model=."
                )
            if mixes and not holder.require_backward_grad_sync:
                raise RuntimeError(
                    "no_sync() of DistributedDataParallel leaves each process gradients of its own, of which a "
                    "combination makes others than of all, and model= does not show the module; pass the wrapped "
                    "module as model=."
                )
            continue
        workers.is_in_a_stage |= isinstance(holder.submod, DistributedDataParallel)
        if lmo.joint and holder.group_size > 1:
            raise NotImplementedError(
                f"{type(lmo).__name__} has one radius for all parameters, of which a pipeline stage holds a part; "
                "use NuSAM, whose matrices have a radius each."
            )


def check_join(delayed: bool, rho_schedule: Any) -> None:
    """Whether processes agree on a step's perturbation though DDP.join() lets them take different numbers of steps."""
    if delayed or rho_schedule is not None:
        raise RuntimeError(
            f"{'delay' if delayed else 'rho_schedule'} counts steps, of which DDP.join() gives every process its own "
            'number; leave it out, and set "rho" in the param groups where the radius is to change.'
        )
