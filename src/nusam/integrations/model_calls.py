"""Whether every pass over a batch calls the model on the same inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Calls"]


class Calls:
    """The inputs that a model is called on, the same in every pass over a batch.

    Sizes are compared in every step, and what tokens and masks say, which waits for the device, in the first, second,
    fourth, ... of them. Labels may come from the model itself.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._first: list[dict[str, Tensor | torch.Size]] = []

    @contextmanager
    def compared(self, model: nn.Module, name: str, later: bool) -> Iterator[None]:
        """Compare the calls of a later pass with those of the first.

        Raises:
            RuntimeError: if they differ.
        """
        self._steps += not later
        by_value = self._steps & (self._steps - 1) == 0
        made: list[dict[str, Tensor | torch.Size]] = []

        def differ() -> RuntimeError:
            return RuntimeError(
                f"{name} calls its model on other inputs in the second pass over a batch than in the first, since its "
                "training_step makes or draws them; let _prepare_inputs make them, which is called once."
            )

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            made.append(_what_counts({**{str(i): value for i, value in enumerate(args)}, **kwargs}, by_value))
            if later and not (len(made) <= len(self._first) and _agree(made[-1], self._first[len(made) - 1])):
                raise differ()

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if not later:
            self._first = made
        elif len(made) != len(self._first):
            raise differ()


def _what_counts(inputs: dict[str, Any], by_value: bool) -> dict[str, Tensor | torch.Size]:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    discrete = {name for name, value in tensors.items() if not (value.is_floating_point() or value.is_complex())}
    return {name: value if by_value and name in discrete else value.shape for name, value in tensors.items()}


def _agree(one: dict[str, Tensor | torch.Size], other: dict[str, Tensor | torch.Size]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
