"""The state of a run on disk: whole or not at all, and the same for any number of processes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nusam.experiments.errors import Refused

__all__ = ["Checkpoint"]


class Checkpoint:
    """Saves a run at the end of every epoch, and when it is asked to stop.

    Args:
        path: the file.
        identity: what the run is, so that no other run takes it up.
        resume: whether to go on from the file.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path, self.identity, self.resume = path, identity, resume
        self.stop_asked = False

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM ask the run to save its state and stop."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop_asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_due(self, epoch_ended: bool) -> bool:
        """Whether to save now; all processes give the same answer."""
        if dist.is_initialized():
            asked = torch.tensor(float(self.stop_asked))
            if dist.get_backend() == "nccl":
                asked = asked.cuda()
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.stop_asked = bool(asked)
        return epoch_ended or self.stop_asked

    def save(
        self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, noise: torch.Generator, progress: Any
    ) -> None:
        """Replace the file."""
        weights, state = get_state_dict(model, optimizer, options=_WHOLE)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".partial")
            content = {
                "identity": self.identity,
                "model": weights,
                "optimizer": state,
                "schedule": schedule.state_dict(),
                "noise": noise.get_state(),
                "random": torch.get_rng_state(),
                "progress": progress,
            }
            try:
                torch.save(content, unfinished)
                os.replace(unfinished, self.path)
            except (OSError, RuntimeError) as error:
                unfinished.unlink(missing_ok=True)
                raise Refused(
                    f"The checkpoint {self.path} could not be written ({error}); make room there, or name another "
                    "folder. What was saved before is still there."
                ) from error
        if dist.is_initialized():
            dist.barrier()

    def load(
        self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, noise: torch.Generator, progress: Any
    ) -> None:
        """Go on from the file, if there is one and that is wanted.

        Raises:
            Refused: if it is another run's, or no checkpoint.
        """
        if not self.resume or not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=False)
            identity = saved["identity"]
        except Exception as error:  # whatever pickle finds wrong with it
            raise Refused(f"{self.path} is no checkpoint ({error}); remove it, or leave out --resume.") from error
        different = [name for name, value in self.identity.items() if identity.get(name) != value]
        if different:
            raise Refused(
                f"{self.path} is of a run with another {' and '.join(different)}; give the same options, or another "
                "--out."
            )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=_WHOLE,
        )
        schedule.load_state_dict(saved["schedule"])
        noise.set_state(saved["noise"])
        torch.set_rng_state(saved["random"])
        vars(progress).update(vars(saved["progress"]))


_WHOLE = StateDictOptions(full_state_dict=True)
