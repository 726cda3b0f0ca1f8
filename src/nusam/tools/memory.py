"""What a method's perturbation costs for a model, exactly (Table 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nusam.lmo import Nuclear
from nusam.methods import NuSAM
from nusam.optimizer import SharpnessAware

__all__ = ["Footprint", "footprint", "perturbation_numel"]


@dataclass(frozen=True)
class Footprint:
    """Bytes alive in the descent pass, without activations and the base optimizer's state."""

    weights: int
    gradients: int
    perturbation: int

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and perturbation together."""
        return self.weights + self.gradients + self.perturbation


def perturbation_numel(model: nn.Module, method: Callable[..., SharpnessAware] = NuSAM) -> int:
    """Floats that ε of ``method`` needs for ``model``, which may live on the meta device.

    Σ(n+m) over the trainable n×m matrices for νSAM and νSAM-Norm, every trainable parameter for SAM and
    GaussSAM, those of normalization layers for SAM-ON. A method with arguments of its own is written
    ``functools.partial(nusam.NuSAM, convolutions=True)``.

    Raises:
        ValueError: if the method finds nothing to perturb in the model.
    """
    return _optimizer(model, method).perturbation_numel()


def footprint(model: nn.Module, method: Callable[..., SharpnessAware] = NuSAM) -> Footprint:
    """Bytes of a model's weights and gradients and of ``method``'s ε while it is applied.

    The vectors of a rank-one ε are held in at least float32; a dense ε is a second copy of the weights it moves.
    """
    parameters = list(model.parameters())
    itemsize = max(parameter.dtype.itemsize for parameter in parameters)
    optimizer = _optimizer(model, method)
    if isinstance(optimizer.lmo, Nuclear):
        itemsize = max(itemsize, 4)
    return Footprint(
        weights=sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters),
        gradients=sum(p.numel() * p.dtype.itemsize for p in parameters if p.requires_grad),
        perturbation=optimizer.perturbation_numel() * itemsize,
    )


def _optimizer(model: nn.Module, method: Callable[..., SharpnessAware]) -> SharpnessAware:
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    return method(base, model=model, placement="weights")
