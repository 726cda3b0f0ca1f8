"""Gradients that a loop changes inside a pass, between its backwards or after the last one, or does more by."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nusam.distributed.blocks import is_sharded
from nusam.interrupts import around_backwards

__all__ = ["Changes"]


class Changes:
    """Watches the gradients of some parameters, which an earlier pass of the same loop did not have.

    Args:
        parameters: whose gradients.
        backwards: how many that pass had; where a gradient leads to another one, as in adversarial training that asks
            whether there is any, it decides over more than itself.
    """

    def __init__(self, parameters: Sequence[Tensor], backwards: int) -> None:
        self.parameters = parameters
        self._left: dict[Tensor, _State] = {}  # gradients after the last backward
        self._changed: dict[Tensor, None] = {}  # parameters whose gradients were changed, in order
        self._more = -backwards

    @property
    def found(self) -> list[Tensor]:
        """The parameters without whose gradients the pass would be another one."""
        return list(self.parameters if self._more > 0 else self._changed)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside is the pass."""

        def watched(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_watched(*args: Any, **kwargs: Any) -> Any:
                if torch._C._current_graph_task_id() != -1:  # inside another
                    return run(*args, **kwargs)
                self._compare()
                result = run(*args, **kwargs)
                self._more += bool(kwargs.get("accumulate_grad", False))
                self._left = {p: _state_of(p) for p in self.parameters}
                return result

            return run_watched

        with around_backwards(watched):
            yield
        self._compare()

    def _compare(self) -> None:
        for parameter, left in self._left.items():
            if left.is_other(_state_of(parameter)):
                self._changed[parameter] = None


class _State(NamedTuple):
    """A gradient, and what a write would change: of ``.data``, which has no version, the sizes alone."""

    gradient: Tensor | None
    version: int = 0
    address: int = 0
    sizes: Tensor | None = None

    def is_other(self, now: "_State") -> bool:
        """Whether it was replaced or written; waits for the device."""
        if now.gradient is not self.gradient or now[1:3] != self[1:3]:
            return True
        return self.sizes is not None and now.sizes is not None and not torch.equal(self.sizes, now.sizes)


def _state_of(parameter: Tensor) -> _State:
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided or is_sharded(gradient):
        return _State(gradient)
    values = gradient.detach()
    sizes = torch.stack([torch.linalg.vector_norm(values), values.sum()]).nan_to_num_()
    return _State(gradient, gradient._version, gradient.data_ptr(), sizes)
