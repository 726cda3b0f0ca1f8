"""An ascent in which no parameter takes part in a backward, so that no gradient is formed in one and no hook runs."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from nusam.interrupts import always
from nusam.layers.reads import Switched, Watcher, told_of_functions, watched

__all__ = ["INSTEAD", "Silence"]

INSTEAD = "nusam.NuSAM around an optimizer of your own"
SCALING = ("torch.distributed.pipelining.stage", "scale_grads")


class Silence:
    """Keeps parameters out of the backwards of a pass, and refuses loops that would have looked for them there.

    Args:
        parameters: all that a backward may reach.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad and p.is_leaf]
        self._known = set(self._parameters)
        self._switched_off: set[Tensor] = set()  # by the loop, in the pass
        self._keeps = False
        self._backwards = 0
        self._looked = False  # whether somebody has looked at a gradient since the last one

    @contextmanager
    def kept(self, watchers: Mapping[Tensor, Watcher], tells: bool) -> Iterator[None]:
        """Inside, who reads one of these beside its layer gets what its watcher has for it, if Python sees that."""
        before = [(p, p.grad) for p in self._parameters]

        def undo() -> None:
            self._keeps = False
            for parameter in self._parameters:
                parameter.requires_grad_(parameter not in self._switched_off)

        with always(undo), ExitStack() as contexts:
            self._keeps = True
            for parameter in self._parameters:
                parameter.requires_grad_(False)
            if tells:
                others = {p: _Told(self, p) for p in self._parameters if p not in watchers}
                contexts.enter_context(watched({p: _Told(self, p, watcher) for p, watcher in watchers.items()}))
                contexts.enter_context(watched(others, Switched))
                contexts.enter_context(told_of_functions())
            yield
            written = [p for p, gradient in before if p.grad is not gradient and not _is_moved(p.grad, gradient)]
            if written:
                for parameter, gradient in before:
                    parameter.grad = gradient
                raise RuntimeError(
                    f"The loop gives a parameter of shape {tuple(written[0].shape)} its gradient itself inside the "
                    f"ascent, which no backward leads to; use {INSTEAD}."
                )

    def admit(self, inputs: Sequence[Any], create_graph: bool, accumulates: bool) -> None:
        """A backward is about to run.

        Raises:
            RuntimeError: if it can't be what it would be without the silence.
        """
        if not self._keeps:
            return
        asked = [x for x in inputs if isinstance(x, Tensor) and x in self._known]
        if asked:
            raise RuntimeError(
                f"The loss asks for the gradient of a parameter of shape {tuple(asked[0].shape)}, which a perturbation "
                f"that leaves gradients to an engine does not form; use {INSTEAD}."
            )
        if not accumulates or inputs:
            return
        if create_graph:
            raise RuntimeError(
                "backward(create_graph=True) makes gradients to be differentiated, which a perturbation that leaves "
                f"gradients to an engine does not form; use {INSTEAD}."
            )
        if self._backwards and self._looked:
            raise RuntimeError(
                "The loop looks at gradients, or clears them, between two backwards of the ascent, which leaves none; "
                f"take the first by torch.autograd.grad, or use {INSTEAD}."
            )
        self._backwards, self._looked = self._backwards + 1, False

    def looked(self) -> None:
        """Somebody looks at the gradient of a parameter, or sets it."""
        self._looked = self._looked or not _only_scales()

    def switch(self, parameter: Tensor, on: bool) -> bool:
        """Somebody sets ``requires_grad`` in the pass: it stays off, and is so afterwards; whether it is on by that.

        Raises:
            RuntimeError: if a parameter is switched on that has not been switched off in the pass.
        """
        if on and parameter not in self._switched_off:
            raise RuntimeError(
                "requires_grad of a parameter is set inside the ascent, in which none takes part in a backward; set it "
                f"before the passes, or use {INSTEAD}."
            )
        if parameter in self._known:
            (self._switched_off.discard if on else self._switched_off.add)(parameter)
        return on

    def check(self) -> None:
        """Refuse a pass without a backward."""
        if not self._backwards:
            raise RuntimeError(
                "The ascent pass ended without a backward, which is where a perturbation that leaves gradients to an "
                "engine finds its own; compute the loss and run it backwards in every pass."
            )


def _only_scales() -> bool:
    """Whether it is a stage of a pipeline that looks, which between its chunks scales all that there is, and no ε."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nusam."):
        frame = frame.f_back
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) == SCALING


class _Told:
    """Who is told of a parameter, and keeps it silent."""

    def __init__(self, silence: Silence, parameter: Tensor, watcher: Any = None) -> None:
        self._silence, self._parameter, self._watcher = silence, parameter, watcher

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        found: Tensor = self._watcher.value(W, tracked)
        return found

    def told(self, of: str, *given: Any, requires_grad: bool = True) -> bool:
        """Whether that was all that is to be done."""
        if of != "requires_grad":
            self._silence.looked()
            return False
        on = self._silence.switch(self._parameter, bool(given[0]) if given else requires_grad)
        if self._watcher is not None:
            self._watcher.is_aside = not on
        return True


def _is_moved(now: Tensor | None, before: Tensor | None) -> bool:
    """Whether a gradient is gone, or the same in other memory, as DistributedDataParallel moves it to new buckets."""
    return now is None or (before is not None and now.shape == before.shape and torch.equal(now, before))
