"""What happens in every step, for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nusam import SharpnessAware

__all__ = ["Scalars"]


class Scalars:
    """Writes an event file.

    Args:
        folder: where to.
        every: steps between two records of the numbers that wait for the device.
    """

    def __init__(self, folder: Path, every: int = 10) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._every = every

    def step(self, step: int, optimizer: Optimizer, losses: Sequence[Tensor]) -> None:
        """Losses of both passes and their gap, the learning rate, and what the optimizer has measured."""
        if step % self._every:
            return
        ascent, *descent = map(float, losses)
        numbers = {"loss/unperturbed": ascent, "learning_rate": float(optimizer.param_groups[0]["lr"])}
        if descent:
            numbers |= {"loss/perturbed": descent[0], "loss/sharpness_gap": descent[0] - ascent}
        if isinstance(optimizer, SharpnessAware):
            numbers |= optimizer.metrics()
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
