"""What can be told of a base optimizer beyond ``torch.optim``'s own, and how it is stepped with a loss."""

from collections.abc import Iterator
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "chain",
    "is_second_order",
    "moves_first",
    "needs_closure",
    "step_knowing",
    "turns_round",
    "unknown_argument",
]

MOVES_FIRST = {"AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"}


def chain(base: Any) -> Iterator[Optimizer]:
    """The base optimizer, and those inside it if it wraps others itself, as Lookahead does."""
    seen: list[Any] = []
    while isinstance(base, Optimizer) and all(base is not other for other in seen):
        seen.append(base)
        yield base
        inner = [value for value in vars(base).values() if isinstance(value, Optimizer)]
        base = inner[0] if inner else None


def turns_round(base: Optimizer) -> bool:
    """Whether it goes up where a group says nothing, and down where one says ``maximize``.

    Some have ``maximize`` of their own, beside that of their groups; each in the chain turns the gradient round.
    """
    return sum(getattr(one, "maximize", False) is True for one in chain(base)) % 2 == 1


def is_second_order(base: Optimizer) -> bool:
    """Whether it needs gradients made with ``create_graph=True``, as far as can be told before a step."""
    return any(
        getattr(one, "is_second_order", False)
        or any("hessian" in name for name in (*one.defaults, *(p.name for p in _parameters(one))))
        for one in chain(base)
    )


def moves_first(base: Optimizer) -> bool:
    """Whether it is known to move the weights before it calls its closure."""
    return any(type(one).__name__ in MOVES_FIRST for one in chain(base))


@lru_cache(maxsize=64)
def _parameters_of(kind: Any) -> list[Parameter]:
    try:
        return list(signature(kind.step).parameters.values())[1:]
    except (TypeError, ValueError):  # not written in Python
        return [Parameter("closure", Parameter.POSITIONAL_OR_KEYWORD, default=None)]


def _parameters(base: Optimizer) -> list[Parameter]:
    """What its ``step`` takes."""
    kind: Any = type(base)
    return _parameters_of(kind)


def _closure_parameter(base: Optimizer) -> Parameter | None:
    """The parameter of ``step`` that takes the closure, if there is one."""
    takes = [p for p in _parameters(base) if p.kind is not Parameter.VAR_KEYWORD]
    return next((p for p in takes if "closure" in p.name), takes[0] if takes else None)


def _is_needed(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL,
        Parameter.VAR_KEYWORD,
    )


def unknown_argument(base: Optimizer) -> str | None:
    """An argument, other than a closure, without which ``step`` can't be called."""
    return next((p.name for p in _parameters(base) if _is_needed(p) and "closure" not in p.name), None)


def needs_closure(base: Optimizer) -> bool:
    """Whether the base can't step without a closure."""
    parameter = _closure_parameter(base)
    return parameter is not None and _is_needed(parameter)


def step_knowing(base: Optimizer, loss: Any, copies: bool) -> None:
    """Let the base step with the gradients that are there, and read the loss that came with them.

    ``copies``: whether to keep the weights, to go back to them if the base turns out to ask for another loss.
    """
    parameter = _closure_parameter(base)
    step = cast(Any, base.step)
    if parameter is None:
        step()
        return
    closure = _KnownLoss(base, loss, copies)
    try:
        if parameter.kind is Parameter.KEYWORD_ONLY:
            step(**{parameter.name: closure})
        else:
            step(closure)
    finally:
        if closure.refused:
            closure.restore()


class _KnownLoss:
    """A closure that has run already. Its loss holds for the weights that it ran at, and for no others."""

    def __init__(self, base: Optimizer, loss: Any, copies: bool) -> None:
        self.refused = False
        self._base = base
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._parameters = [parameter for group in base.param_groups for parameter in group["params"]]
        self._versions = [parameter._version for parameter in self._parameters]
        self._copies = [parameter.detach().clone() for parameter in self._parameters] if copies else []

    def __call__(self) -> Any:
        if any(p._version != before for p, before in zip(self._parameters, self._versions, strict=True)):
            self.refused = True
            raise RuntimeError(
                f"base_optimizer {type(self._base).__name__} evaluates its closure at other weights than the step "
                "began at, where the passes have found no gradient; use another base optimizer."
            )
        return self._loss

    @torch.no_grad()
    def restore(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._parameters, self._copies)
