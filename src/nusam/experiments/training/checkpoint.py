"""The state of a run on disk: whole or not at all, and the same for any number of processes."""

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nusam.experiments.errors import Refused
from nusam.experiments.files import save_whole

__all__ = ["Checkpoint", "State"]


class State(NamedTuple):
    """What a run goes on from: all of it changes as it trains."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    noise: torch.Generator
    progress: Any


class Checkpoint:
    """Saves a run at the end of every epoch, and when it is asked to stop.

    Args:
        path: the file.
        identity: what the run is, in parts (run, recipe, ...) of named options, so that no other run takes it up.
        resume: whether to go on from the file.
    """

    def __init__(self, path: Path, identity: dict[str, dict[str, Any]], resume: bool) -> None:
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

    def save(self, state: State) -> None:
        """Replace the file.

        Raises:
            Refused: in every process, if there is no room; the file is the old one then.
        """
        with warnings.catch_warnings():  # the delay is a share of the run's own steps, which are not over
            warnings.filterwarnings("ignore", "The perturbation has not been active")
            weights, optimizer = get_state_dict(state.model, state.optimizer, options=_WHOLE)
        drawn = _by_process(_generators(state.model))
        refusal = [""]
        if not dist.is_initialized() or dist.get_rank() == 0:
            content = {
                "identity": self.identity,
                "model": weights,
                "optimizer": optimizer,
                "schedule": state.schedule.state_dict(),
                "scaler": state.scaler.state_dict(),
                "noise": state.noise.get_state(),
                "random": drawn,
                "progress": vars(state.progress),
            }
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                save_whole(self.path, content)
            except OSError as error:
                kept = "what was saved before is still there" if self.path.exists() else "nothing was saved before"
                refusal = [
                    f"The checkpoint {self.path} could not be written ({error.strerror}); make room there, or name "
                    f"another folder ({kept})."
                ]
        if dist.is_initialized():
            dist.broadcast_object_list(refusal)
        if refusal[0]:
            raise Refused(refusal[0])

    def load(self, state: State) -> None:
        """Go on from the file, if there is one and that is wanted.

        Raises:
            Refused: if it is another run's, or no checkpoint.
        """
        if not self.resume or not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=False)
            different = _differences(saved["identity"], self.identity)
        except Exception as error:  # whatever pickle finds wrong with it
            raise self._broken(error) from error
        if different:
            raise Refused(f"{self.path} is of a run with {different}; give the same options, or another --out.")
        try:
            set_state_dict(
                state.model,
                state.optimizer,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
                options=_WHOLE,
            )
            state.schedule.load_state_dict(saved["schedule"])
            if state.scaler.is_enabled():
                state.scaler.load_state_dict(saved["scaler"])
            state.noise.set_state(saved["noise"])
            rank = dist.get_rank() if dist.is_initialized() else 0
            _set_generators(state.model, saved["random"][rank % len(saved["random"])])
            progress = vars(state.progress)
            progress.update({name: saved["progress"][name] for name in progress})
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> Refused:
        why = f"it lacks {error}" if isinstance(error, KeyError) else (str(error) or repr(error)).splitlines()[0]
        return Refused(f"{self.path} is no whole checkpoint ({why}); remove it, or leave out --resume.")


def _differences(saved: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]]) -> str:
    """The options that tell the runs apart, as they were saved and as they are given."""
    return ", ".join(
        f"{name.replace('_', ' ')} {saved[part].get(name, 'unknown')} and not {value}"
        for part, options in given.items()
        for name, value in options.items()
        if saved[part].get(name, "unknown") != value
    )


def _generators(model: nn.Module) -> dict[str, torch.Tensor]:
    """The states of the global generators that the model can draw from."""
    device = next(model.parameters()).device
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_generators(model: nn.Module, states: dict[str, torch.Tensor]) -> None:
    device = next(model.parameters()).device
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def _by_process(mine: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Those of every process: dropout draws for as many images as the process has."""
    if not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


_WHOLE = StateDictOptions(full_state_dict=True)
