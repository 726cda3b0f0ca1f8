"""The base optimizer's update of each parameter as soon as its gradient is complete, which is freed at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nusam.interrupts import always
from nusam.layers.reads import untold

__all__ = ["StepInBackward"]

_SEVERAL = (
    "{} gets its gradient in several backwards of a pass, where step_in_backward() would step it in each; add the "
    "losses up and call backward() once a pass, or leave step_in_backward() out."
)


class StepInBackward:
    """Hooks that step ``base_optimizer`` for one parameter at a time while :meth:`running`.

    The update must be per parameter, as it is in torch.optim: what a parameter's update needs is its group's
    hyperparameters and its own state.
    """

    def __init__(self, base_optimizer: Optimizer) -> None:
        self._base_optimizer = base_optimizer
        self._groups: dict[Tensor, dict[str, Any]] = {}  # of every parameter, while running
        self.stepped: set[Tensor] = set()  # in the last descent
        trainable = [p for group in base_optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._hooked = set(trainable)
        self._handles = [parameter.register_post_accumulate_grad_hook(self._step) for parameter in trainable]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The descent pass, in which complete gradients are spent."""

        def undo() -> None:
            self._groups = {}

        with always(undo):
            self.stepped = set()
            self._groups = {p: group for group in self._base_optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and p not in self._hooked for p in self._groups):
                raise RuntimeError(
                    "A parameter was unfrozen, or added to the optimizer, after step_in_backward(), and would never be "
                    "stepped; call detach() and step_in_backward() anew, or do it before."
                )
            yield
            if not self.stepped:
                raise RuntimeError(
                    "The descent pass ended without any gradient; compute the loss and call loss.backward() "
                    "in every pass."
                )

    def refuse_several(self, several: Iterable[str]) -> None:
        """Refuse a step whose ascent gave parameters of these names a gradient in several backwards."""
        for name in several:
            raise RuntimeError(_SEVERAL.format(name))

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _step(self, parameter: Tensor) -> None:
        group = self._groups.get(parameter)
        if group is None:
            return
        if parameter in self.stepped:
            raise RuntimeError(_SEVERAL.format(f"A parameter of shape {tuple(parameter.shape)}"))
        alone = {**group, "params": [parameter]}
        groups = self._base_optimizer.param_groups
        self._base_optimizer.param_groups = [alone]
        try:
            untold(self._base_optimizer.step)
        finally:
            self._base_optimizer.param_groups = groups
        if any(name not in group or value is not group[name] for name, value in alone.items() if name != "params"):
            raise TypeError(
                f"{type(self._base_optimizer).__name__} keeps state in its param groups, which steps of one parameter "
                "at a time would lose; use a base optimizer that keeps its state per parameter."
            )
        parameter.grad = None
        self.stepped.add(parameter)
