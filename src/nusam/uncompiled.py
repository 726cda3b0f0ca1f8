"""What ``torch.compile`` runs as it is written when it compiles the loop around it: passes set up and take down."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

__all__ = ["Uncompiled", "uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """A context manager of a generator, as :func:`contextlib.contextmanager` makes it, whose ends are not compiled."""
    make = contextmanager(function)

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Context(make(*args, **kwargs))

    return made


class _Context(AbstractContextManager[T]):
    def __init__(self, context: AbstractContextManager[T]) -> None:
        self._context = context

    def __enter__(self) -> T:
        return cast(T, _eager(_enter)(self._context))

    def __exit__(self, *exception: Any) -> bool | None:
        return cast(bool | None, _eager(_exit)(self._context, *exception))


class Uncompiled(Iterator[T], Generic[T]):
    """The items of a generator, whose steps from one to the next are not compiled."""

    def __init__(self, items: Generator[T, None, None]) -> None:
        self._items = items

    def __next__(self) -> T:
        return cast(T, _eager(next)(self._items))

    def close(self) -> None:
        """Leave the generator, wherever it is, as its own ``close`` does."""
        _eager(_close)(self._items)


def _enter(context: AbstractContextManager[T]) -> T:
    return context.__enter__()


def _close(items: Generator[Any, None, None]) -> None:
    items.close()


def _exit(context: AbstractContextManager[Any], *exception: Any) -> bool | None:
    return context.__exit__(*exception)


@cache
def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled
