"""What two passes would do to a model beyond its gradients, and what ``model=`` switches on against it.

Batch statistics would count twice, dropout would draw two masks, and perturbed weights could be saved or
evaluated.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from nusam.interrupts import always
from nusam.module_tree import ModuleTree
from nusam.sharding import compute_device

__all__ = ["ModelGuard", "RandomState", "frozen_statistics", "normalization_parameters", "refuse_use"]


class ModelGuard:
    """What is undone or refused in the two passes of every step of one model; without a model nothing is."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.tree = None if model is None else ModuleTree(model)
        self._random_state: RandomState | None = None
        self._ascended = False

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        return ModelGuard, (self.model,)  # what is remembered belongs to one step, and steps are not copied

    def before_ascent(self, everything: bool = False) -> None:
        """Remember generators and buffers as they are; ``everything``: large ones too, which waits for the device."""
        self._ascended = False
        if self.model is not None:
            self._random_state = RandomState(self.model)

    def after_ascent(self) -> None:
        """The ascent is complete: the next descent is its second pass."""
        self._ascended = True

    @contextmanager
    def descent(self, perturbed: bool) -> Iterator[None]:
        """The second pass over a sample, if an ascent came before: from the same buffers and generators.

        ``perturbed``: whether any weight is, so that saving, copying and evaluating the model must be refused.
        """
        second, self._ascended = self._ascended, False
        random_state, self._random_state = self._random_state, None
        with ExitStack() as contexts:
            if self.model is not None and perturbed:
                contexts.enter_context(refuse_use(self.model))
            if self.model is not None and second:
                contexts.enter_context(frozen_statistics(self.model))
                if random_state is not None:
                    random_state.replay()
            yield


class RandomState:
    """The global random generators of the CPU and of the model's devices, to be replayed."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {compute_device(parameter) for parameter in model.parameters()} - {
            torch.device("cpu"),
            torch.device("meta"),
        }
        self._others = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def replay(self) -> None:
        """Set the generators back, so that the next pass draws the same dropout masks."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize with the batch's statistics as in training, and leave the running ones alone."""
    batch_norms: list[_BatchNorm] = []
    instance_norms: list[tuple[_InstanceNorm, float | None]] = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            batch_norms.append(module)
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            instance_norms.append((module, module.momentum))

    def undo() -> None:
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = True
        for instance_norm, momentum in instance_norms:
            instance_norm.momentum = momentum

    with always(undo):
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = False
        for instance_norm, _ in instance_norms:
            instance_norm.momentum = 0.0
        yield


@contextmanager
def refuse_use(model: nn.Module) -> Iterator[None]:
    """While the weights are perturbed, saving, copying and evaluating the model raises."""
    guard = _Guard()
    handles: list[Any] = []

    def undo() -> None:
        guard.armed = False  # a hook whose handle an interrupt kept from us stays, and does nothing
        for handle in handles:
            handle.remove()

    with always(undo):
        guard.armed = True
        for module in _with_wrapped(model):
            handles.append(module.register_state_dict_pre_hook(guard.refuse_saving))  # type: ignore[no-untyped-call]
            handles.append(module.register_forward_pre_hook(guard.refuse_evaluation))
        yield


def normalization_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The own parameters of every normalization layer: modules whose class name contains "norm"."""
    layers = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return {parameter for layer in layers for parameter in layer.parameters(recurse=False)}


def _with_wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it merely wraps (DistributedDataParallel, a compiled module)."""
    yield model
    children = list(model.children())
    if len(children) == 1:
        yield from _with_wrapped(children[0])


class _Guard:
    """Hooks that refuse, and refuse to be copied or pickled with their module."""

    def __init__(self) -> None:
        self.armed = False

    def refuse_saving(self, *_: Any) -> None:
        if self.armed:
            raise RuntimeError(
                "The model's weights are perturbed inside the descent pass and can't be saved or copied there; "
                "do it after the pass."
            )

    def refuse_evaluation(self, *_: Any) -> None:
        if self.armed and not torch.is_grad_enabled():
            raise RuntimeError(
                "The model was called without gradients inside the descent pass, where its weights are perturbed; "
                "evaluate it after the pass."
            )

    def __getstate__(self) -> dict[str, bool]:
        self.refuse_saving()
        return {"armed": False}
