"""Gradients that the loss itself asks for inside an ascent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nusam.ascent.silence import Silence
from nusam.interrupts import around_backwards
from nusam.layers.idle import IdleLayers

__all__ = ["standing_in"]


@contextmanager
def standing_in(
    stand_ins: dict[Tensor, Tensor],
    idle: IdleLayers,
    ran: Callable[[], None],
    silence: Silence | None = None,
) -> Iterator[None]:
    """Inside, the loss may ask for the gradient of a served weight: its stand-in answers.

    This is where torch.autograd.grad and Tensor.backward(inputs=...) hand over to the engine. After every backward that
    accumulates, ``ran`` is called.
    """

    def asking(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_with_stand_ins(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            grad_outputs, retain_graph, create_graph, inputs, *rest = args
            if silence is not None:
                silence.admit(inputs, create_graph, kwargs.get("accumulate_grad", False))
                if not inputs:  # what depends on silent parameters alone has nothing to give
                    reaching = [i for i, output in enumerate(outputs) if output.requires_grad]
                    if not reaching:
                        return None
                    outputs, grad_outputs = (tuple(those[i] for i in reaching) for those in (outputs, grad_outputs))
                    args = grad_outputs, *args[1:]
            idle.refuse_hidden(inputs)
            served = [x for x in inputs if isinstance(x, Tensor) and x in stand_ins]
            if not served:
                return run(outputs, *args, **kwargs)
            # what does not go through their layers reaches the parameters themselves
            asked = (*(stand_ins.get(x, x) if isinstance(x, Tensor) else x for x in inputs), *served)
            found = run(outputs, grad_outputs, retain_graph, create_graph, asked, *_unused_allowed(rest), **kwargs)
            if not isinstance(found, tuple):
                return found  # they are in the tensors themselves
            own = dict(zip(served, found[len(inputs) :], strict=True))
            gradients = tuple(
                _added(_as_hooks_make_it(g, x), own[x]) if isinstance(x, Tensor) and x in own else g
                for g, x in zip(found, inputs, strict=False)
            )
            if rest and not rest[0] and any(g is None for g in gradients):
                raise RuntimeError(
                    "One of the differentiated Tensors appears to not have been used in the graph. Set "
                    "allow_unused=True if this is the desired behavior."
                )
            return gradients

        def run_and_tell(*args: Any, **kwargs: Any) -> Any:
            found = run_with_stand_ins(*args, **kwargs)
            if kwargs.get("accumulate_grad", False) and torch._C._current_graph_task_id() == -1:  # in no other one
                ran()
            return found

        return run_and_tell

    with around_backwards(asking):
        yield


def _unused_allowed(rest: list[Any]) -> list[Any]:
    """What follows the inputs of a backward, with leave for some of them to be unused."""
    return [True, *rest[1:]] if rest else []


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _as_hooks_make_it(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """What the parameter's own hooks, which its stand-in does not have, make of its gradient."""
    if gradient is not None:
        for hook in (parameter._backward_hooks or {}).values():
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient
