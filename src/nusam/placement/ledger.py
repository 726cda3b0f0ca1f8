"""What a step's passes owe each other: gradients in both, and an ε for whatever got a gradient in the descent."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nusam.interrupts import entered

_RUN_TO_COUNT = itertools.count(1)

__all__ = ["Ledger", "clear_gradients", "count_backwards", "not_added"]


class Ledger:
    """Compares what got a gradient in a descent with what had an ε there, and says each thing of a parameter once."""

    def __init__(self) -> None:
        self._had_gradients = False  # in any pass of the run
        self._in_ascent = False  # of this step
        self._backwards = 0
        self._told: set[tuple[Tensor, str]] = set()  # and what was said of it
        self._without: list[tuple[Tensor, Tensor | None, int]] = []

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_without": []}

    # ------------------------------------------------------------ gradients at all

    def begin_pass(self) -> None:
        """A pass begins."""
        if not self._had_gradients:
            self._backwards = count_backwards()

    def end_pass(self, name: str, found: bool, must: bool, ran: bool = False) -> None:
        """A pass is over, in which some parameter got a gradient or none did.

        Args:
            name: of the pass.
            found: whether some parameter of the optimizer got one.
            must: whether one has to, always.
            ran: whether a backward is known to have run.

        Raises:
            RuntimeError: if ``backward`` was never called. A sample that does not reach these parameters, which may be
                those of one optimizer among several, is none of our business.
        """
        forgotten = not self._had_gradients and count_backwards() == self._backwards
        if not (found or ran) and (must or forgotten or (name == "descent" and self._in_ascent)):
            raise RuntimeError(
                f"The {name} pass ended without any gradient; compute the loss and call loss.backward() in every pass."
            )
        self._had_gradients |= found
        self._in_ascent = found and name == "ascent"

    # ------------------------------------------------------------ an ε for every gradient

    def open(self, without: Iterable[Tensor]) -> None:
        """The descent begins, in which these targets have no ε."""
        self._without = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in without]

    def close(
        self, stepped: set[Tensor], names: Callable[[], dict[Tensor, str]], is_carried: bool = False
    ) -> list[Tensor]:
        """What got a gradient and no ε in the descent, which is over.

        ``stepped``: those whose gradients are spent; ``is_carried``: whether ε came with the step before.
        """
        missed = [
            p
            for p, gradient, version in self._without
            if p in stepped or (p.grad is not None and (p.grad is not gradient or p.grad._version != version))
        ]
        self._without = []
        where, then = (
            ("where its ε would have been found, with the step before", "it is perturbed from the next step on")
            if is_carried
            else ("in the ascent", "run the same computation in both passes")
        )
        self.tell(
            missed,
            names,
            f"got a gradient in the descent and none {where}, and was not perturbed in this step; {then}",
        )
        return missed

    def tell(self, parameters: Sequence[Tensor], names: Callable[[], dict[Tensor, str]], what: str) -> None:
        """Warn of the parameters of which this has not been said before."""
        new = [parameter for parameter in parameters if (parameter, what) not in self._told]
        if new:
            self._told.update((parameter, what) for parameter in new)
            known = names()
            warnings.warn(f"{', '.join(known[parameter] for parameter in new)} {what}.", stacklevel=2)


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """So that a pass begins without any."""
    for parameter in parameters:
        parameter.grad = None


class Counted(Protocol):
    """A handler that adds ε in the forward."""

    @property
    def calls(self) -> int:
        """That added it, outside of compiled graphs."""
        ...


def not_added(forward: Mapping[Tensor, Counted]) -> list[Tensor]:
    """Those whose ε no layer has added in a descent, though their gradients say that they were used.

    Where nothing at all was counted a compiled graph has added it, which does not count.
    """
    if not any(handler.calls for handler in forward.values()):
        return []
    return [p for p, handler in forward.items() if not handler.calls]


def count_backwards() -> int:
    """How many backwards this process has begun, but for those that are run here to count them."""
    seen: list[int] = []
    with entered(torch.enable_grad(), torch.autocast("cpu", enabled=False)):
        root = torch.zeros((), requires_grad=True, device="cpu")
        root.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))  # type: ignore[no-untyped-call]
        engine: Any = torch.autograd.Variable._execution_engine  # past whoever counts what loops hand to it
        engine.run_backward((root,), (torch.ones_like(root),), False, False, (), accumulate_grad=True)
    return seen[0] - next(_RUN_TO_COUNT)
