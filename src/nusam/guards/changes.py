"""Gradients that a loop changes inside a pass: between its backwards, or after the last one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nusam.interrupts import around_backwards

__all__ = ["Changes"]


class Changes:
    """Watches the gradients of some parameters.

    Args:
        parameters: whose gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._left: dict[Tensor, tuple[Tensor | None, int]] = {}  # gradients after the last backward, their versions
        self.found: dict[Tensor, None] = {}  # parameters whose gradients were changed, in order

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside is the pass."""

        def watched(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_watched(*args: Any, **kwargs: Any) -> Any:
                if torch._C._current_graph_task_id() != -1:  # inside another
                    return run(*args, **kwargs)
                self._compare()
                result = run(*args, **kwargs)
                self._left = {p: _state(p) for p in self._parameters}
                return result

            return run_watched

        with around_backwards(watched):
            yield
        self._compare()

    def _compare(self) -> None:
        for parameter, (gradient, version) in self._left.items():
            now, its_version = _state(parameter)
            if now is not gradient or its_version != version:
                self.found[parameter] = None


def _state(parameter: Tensor) -> tuple[Tensor | None, int]:
    gradient = parameter.grad
    return gradient, -1 if gradient is None else gradient._version
