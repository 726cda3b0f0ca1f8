"""What a method's perturbation costs for a model, exactly (Table 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nusam.lmo import Nuclear
from nusam.methods import NuSAM
from nusam.optimizer import SharpnessAware
from nusam.power_iteration import working_dtype
from nusam.tools.arguments import check_method, check_network, check_takes_options, shortly

__all__ = ["Footprint", "footprint", "perturbation_numel"]


@dataclass(frozen=True)
class Footprint:
    """Bytes alive in a perturbed descent pass, without activations, buffers and the base optimizer's state."""

    weights: int
    gradients: int
    perturbation: int
    remembered: int = 0
    """What else the method keeps: running means and masks, and the gradient at the weights if it combines both."""

    @property
    def total(self) -> int:
        """Bytes of all of them together."""
        return self.weights + self.gradients + self.perturbation + self.remembered


def perturbation_numel(model: nn.Module, method: Callable[..., SharpnessAware] = NuSAM) -> int:
    """Floats that ε of ``method`` needs for ``model``, which may live on the meta device.

    Σ(n+m) over the trainable n×m matrices for νSAM and νSAM-Norm, every trainable parameter for SAM and
    GaussSAM, those of normalization layers for SAM-ON. A method with arguments of its own is written
    ``functools.partial(nusam.NuSAM, convolutions=True)``.

    Raises:
        TypeError: if the model is no module, or the method no method.
        ValueError: if the method finds nothing to perturb in the model.
    """
    return _optimizer(model, method).perturbation_numel()


def footprint(model: nn.Module, method: Callable[..., SharpnessAware] = NuSAM) -> Footprint:
    """Bytes of a model's weights and gradients and of ``method``'s ε while it is applied.

    The vectors of a rank-one ε are held in at least float32; a dense ε is a second copy of the weights it moves. What
    a direction or a combination stores (:mod:`nusam.directions`, :mod:`nusam.combinations`) is counted as remembered.

    Raises:
        TypeError: if the model is no module, or the method no method.
        ValueError: if the method finds nothing to perturb in the model.
    """
    optimizer = _optimizer(model, method)
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    targets = [target.parameter for target in optimizer._targets(factor=1.0)]
    is_rank_one = isinstance(optimizer.lmo, Nuclear)
    return Footprint(
        weights=sum(map(_nbytes, parameters)),
        gradients=sum(map(_nbytes, trainable)),
        perturbation=sum(
            optimizer._numel(p) * (working_dtype(p) if is_rank_one else p.dtype).itemsize for p in targets
        ),
        remembered=_remembered(optimizer, targets, trainable),
    )


def _remembered(optimizer: SharpnessAware, targets: Sequence[Tensor], trainable: Sequence[Tensor]) -> int:
    """Bytes of what ball, direction and combination say they store, and of the gradient kept for the combination."""
    ball, direction, combination = optimizer.lmo, optimizer.direction, optimizer.combination
    kept = [] if combination is None else trainable
    states = []
    for parameter in {*targets, *kept}:
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")  # that nothing is allocated
        states.append(direction.init_state(shape))
        if combination is not None:
            states.append(combination.init_state(shape))
        if not isinstance(ball, Nuclear):  # whose warm start is a part of ε
            states.append(ball.init_state(shape, 0))
    return sum(map(_nbytes, kept)) + sum(_nbytes(stored) for state in states for stored in state.values())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _optimizer(model: nn.Module, method: Callable[..., SharpnessAware]) -> SharpnessAware:
    check_network(model)
    options: dict[str, Any] = {"model": model, "placement": "weights"}
    check_method("method", method)
    check_takes_options("method", method, options)
    made = method(torch.optim.SGD(model.parameters(), lr=0.0), **options)
    if not isinstance(made, SharpnessAware):
        raise TypeError(f"method must make a nusam.SharpnessAware of an optimizer, got {shortly(made)}.")
    return made
