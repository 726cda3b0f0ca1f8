"""What happens in every step, for TensorBoard."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nusam import SharpnessAware

__all__ = ["Scalars"]


class Scalars:
    """Writes an event file, step by step and in this thread, so that a full disk is an OSError here.

    Args:
        folder: where to.
        every: steps between two records of the numbers that wait for the device.
    """

    def __init__(self, folder: Path, every: int = 10) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = Event
        self._summary: Any = Summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records: Any = RecordWriter(self._file)
        self._every = every
        self._write(file_version="brain.Event:2")

    def step(self, step: int, optimizer: Optimizer, losses: Mapping[str, Tensor]) -> None:
        """Losses of both passes and their gap, the learning rate, and what the optimizer has measured."""
        if step % self._every:
            return
        numbers = {f"loss/{name}": float(loss) for name, loss in losses.items()}
        if len(losses) == 2:
            numbers["loss/sharpness_gap"] = numbers["loss/perturbed"] - numbers["loss/unperturbed"]
        numbers["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        if isinstance(optimizer, SharpnessAware):
            numbers |= optimizer.metrics()
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file; every step has been written, or has said why it could not."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
