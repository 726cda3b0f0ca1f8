"""Passes of several optimizers that run at once, as ``for _ in zip(a.passes(), b.passes())`` runs them.

A pass undoes what it has done to the model and to torch as a ``with`` does, the last first, and ``zip`` leaves the
first pass first. So a pass that ends lets those end before it that began inside it.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from nusam.interrupts import always
from nusam.placement.ledger import count_backwards
from nusam.uncompiled import uncompiled
from nusam.wrapper import itself

__all__ = ["one_inside_the_other", "running", "share_needs"]

P = ParamSpec("P")
T = TypeVar("T")


class _Thread(threading.local):
    """The passes that run in a thread, the outermost first; a loop that is dropped takes its pass with it."""

    def __init__(self) -> None:
        self.passes: list[weakref.ref[_Pass]] = []


_THREAD = _Thread()


def running(besides: Any) -> list[Any]:
    """The optimizers that are inside a pass in this thread, but for one."""
    passes = [known() for known in _THREAD.passes]
    return [pass_.owner for pass_ in passes if pass_ is not None and pass_.owner is not besides]


def share_needs(opt: Any, pass_: Any, others: Sequence[Any]) -> None:
    """Let the layers of an ascent form the gradients that optimizers beside it need, and theirs those that it needs."""
    for other in others:
        if pass_ is not None:
            pass_.need(_needs(other, other._layer_pass))
        if other._layer_pass is not None:
            other._layer_pass.need(_needs(opt, pass_))


def _needs(opt: Any, pass_: Any) -> set[Tensor]:
    return {*opt._parameters(), *(pass_.records if pass_ is not None else ())}


def one_inside_the_other(
    function: Callable[Concatenate[T, P], Iterator[None]],
) -> Callable[Concatenate[T, P], AbstractContextManager[None]]:
    """A method that is a pass, as a context manager, whose ends ``torch.compile`` runs as they are written."""
    make = contextmanager(function)

    @uncompiled
    @wraps(function)
    def made(opt: T, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[None]:
        pass_ = _Pass(itself(opt), make(opt, *args, **kwargs))
        with always(pass_.close), pass_:
            yield

    return made


class _Pass(AbstractContextManager[None]):
    def __init__(self, owner: Any, context: Any) -> None:
        self.owner = owner
        self._context = context  # of a generator
        self._passes = _THREAD.passes
        self._backwards: int | None = None  # of the process, when a pass around this one has ended it

    def __enter__(self) -> None:
        self._context.__enter__()
        self._passes.append(weakref.ref(self))

    def __exit__(self, *raised: Any) -> bool | None:
        if self._backwards is not None:
            if raised[0] is None and count_backwards() != self._backwards:
                raise RuntimeError(
                    "A backward ran in a pass after the pass around it had ended, and this one with it; end passes "
                    "that run at once together, or the one that began last first."
                )
            return None
        known = [pass_() for pass_ in self._passes]
        place = known.index(self) if self in known else len(known)
        inside = [pass_ for pass_ in known[place + 1 :] if pass_ is not None]
        del self._passes[place:], known
        if not inside:  # what a stack keeps of an interrupt would keep the pass that it cut short
            swallowed: bool | None = self._context.__exit__(*raised)
            return swallowed
        ends = ExitStack()
        ends.push(self._context)
        for pass_ in inside:
            ends.push(pass_._end)
        return ends.__exit__(*raised)

    def close(self) -> None:
        """It is over, though an interrupt may have come before the end of it."""
        self._passes[:] = [known for known in self._passes if known() is not self]
        self._context.gen.close()

    def _end(self, *raised: Any) -> bool | None:
        """The pass around it ends."""
        self._backwards = 0
        swallowed: bool | None = self._context.__exit__(*raised)
        self._backwards = count_backwards()
        return swallowed
