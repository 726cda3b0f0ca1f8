"""Which weights can't be perturbed as asked."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nusam.directions import Direction
from nusam.distributed.blocks import is_cut_by_rows, is_sharded
from nusam.distributed.data_parallel import DataParallel
from nusam.layers.kinds import held, is_quantized
from nusam.lmo import LMO, Nuclear

__all__ = ["check_formed", "check_frozen", "check_own", "check_parameter", "check_sharded"]


def check_parameter(
    parameter: Tensor,
    lmo: LMO,
    placement: str,
    reachable: bool,
    direction: Direction | None = None,
    serves: bool = True,
) -> None:
    """Whether ``lmo``'s perturbation can be computed for the parameter, and applied to it.

    ``reachable``: whether a layer is known through which ε could live in the forward; ``serves``: whether layers are
    asked for what the ascent needs.
    """
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    quantized = not parameter.requires_grad and reachable and isinstance(lmo, Nuclear)
    if not (parameter.is_floating_point() or quantized):
        raise TypeError(f"{what} is {parameter.dtype}, only real floating point can be perturbed; set its rho to 0.")
    if hasattr(parameter, "_st_info"):
        raise NotImplementedError(
            f"{what} is a tensor-parallel one that DistributedDataParallel with device_mesh= has taken apart, so that "
            "this process knows a block of it alone; use fully_shard around tensor parallelism, or that alone."
        )
    blind = next((x for x in (lmo, direction) if x is not None and not x.sees_shards), None)
    if is_sharded(parameter) and blind is not None:
        raise NotImplementedError(
            f"{what} is sharded, which {type(blind).__name__} can't see through; use NuSAM, NuSAMNorm, SAM or SAMON, "
            "or DistributedDataParallel."
        )
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise TypeError(f"{what} has a sparse gradient, only dense ones are supported; use sparse=False or rho=0.")
    rank_one = isinstance(lmo, Nuclear)
    if not parameter.requires_grad and not (rank_one and reachable):
        raise ValueError(
            f"{what} is frozen and has no gradient, and no known layer can serve it; exclude it with targets=."
        )
    if not parameter.requires_grad and not serves:
        raise ValueError(f"{what} is frozen and has no gradient, which ascent='gradient' needs; use ascent='auto'.")
    if parameter.requires_grad and is_quantized(parameter) and (placement == "weights" or not (rank_one and reachable)):
        raise TypeError(
            f"{what} keeps its entries in {held(parameter).dtype}, where no ε can be written; use nusam.NuSAM with "
            "model= and placement='auto', whose ε lives in its layer's forward, or exclude it with targets=."
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
    if workers.forced is not None:
        raise ValueError(
            f"targets='frozen' needs a matrix-free ascent, but {workers.forced.why}; use {workers.forced.instead}."
        )


def check_formed(parameters: Iterable[Tensor], reasons: Mapping[Tensor, str], names: Callable[[], Any]) -> None:
    """Whether the ascent that begins finds the gradients of these, which its pass has nothing to do with.

    ``reasons``: why their layers don't serve them. Nothing else finds that of a frozen one.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            raise RuntimeError(
                f"{names()[parameter]} is frozen and {reasons.get(parameter, 'not served by its layer')}, so that it "
                "would have no ε; exclude it with targets=."
            )


def check_own(parameters: Iterable[Tensor], lmo: LMO, is_own: Callable[[Tensor], bool]) -> None:
    """Whether parameters of this process alone leave the processes one ε of those that they share."""
    for parameter in filter(is_own, parameters):
        what = f"A parameter of shape {tuple(parameter.shape)}"
        if lmo.joint:
            raise NotImplementedError(
                f"{what} is outside of what DistributedDataParallel or fully_shard holds, so that processes would "
                f"disagree on the one radius that {type(lmo).__name__} has for all parameters; let the wrapper hold "
                "it, or use NuSAM, whose matrices have a radius each."
            )
        if not parameter.requires_grad:
            raise NotImplementedError(
                f"{what} is frozen and outside of what DistributedDataParallel or fully_shard holds, so that nothing "
                "tells whether processes share it; let the wrapper hold it, or exclude it with targets=."
            )


def check_sharded(parameter: Tensor, lmo: LMO, model: Any, m_sam: Any, workers: DataParallel, own: bool) -> None:
    """Whether a perturbed parameter that is a DTensor can be served as asked."""
    what = f"A perturbed parameter of shape {tuple(parameter.shape)}"
    if model is None:
        raise ValueError(f"{what} is sharded, and its module must learn when it changes; pass the module as model=.")
    if m_sam and not own:
        raise ValueError(
            f"{what} is sharded, so that its processes can have perturbations of their own from a matrix-free ascent "
            "and in the forward only; use NuSAM or NuSAMNorm with ascent and placement 'auto', or m_sam=False."
        )
    if parameter.ndim > 2 and isinstance(lmo, Nuclear) and not is_cut_by_rows(parameter):
        raise NotImplementedError(
            f"{what} is a kernel that is sharded within its rows, of which no process has a block; shard it along its "
            "first dimension, or exclude it with targets=."
        )
    if m_sam and workers.is_tensor_parallel(parameter):
        raise NotImplementedError(f"{what} is tensor parallel, where m_sam is not available; use m_sam=False.")
