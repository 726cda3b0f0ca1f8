"""Weights of a compiled model that are read outside of its graphs.

A graph is guarded by its parameters' class, and its backward must have them as they are. So they are of the watched
class only while neither a graph nor a backward runs: torch says when through the functions that begin and end both.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nusam.interrupts import always, around_backwards
from nusam.layers.reads import Watched, Watcher, watched

__all__ = ["watched_outside_graphs"]


@contextmanager
def watched_outside_graphs(watchers: Mapping[Tensor, Watcher]) -> Iterator[None]:
    """Inside, the watchers are told of what eager code does with their parameters, before and after backwards."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    set_frame = getattr(frames, "_maybe_set_eval_frame", None)
    if set_frame is None:  # a torch that compiles otherwise
        yield
        return
    with watched(watchers):
        parameters = [parameter for parameter in watchers if type(parameter) is Watched]

        def become(kind: type[nn.Parameter]) -> None:
            for parameter in parameters:
                parameter.__class__ = kind  # type: ignore[assignment]

        outermost = 0  # the call in which everything is compiled or a backward, if any is running

        def set_frame_and_class(callback: Any) -> Any:
            nonlocal outermost
            call = id(sys._getframe(1))
            if callback and not outermost:
                outermost = call
                become(nn.Parameter)  # before: what comes after would be compiled
            found = set_frame(callback)
            if not callback and outermost == call:
                outermost = 0
                become(Watched)
            return found

        def unwatched(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_unwatched(*args: Any, **kwargs: Any) -> Any:
                nonlocal outermost
                if outermost:
                    return run(*args, **kwargs)
                outermost = id(sys._getframe())
                become(nn.Parameter)
                try:
                    return run(*args, **kwargs)
                finally:
                    outermost = 0
                    become(Watched)

            return run_unwatched

        def undo() -> None:
            frames._maybe_set_eval_frame = set_frame

        with always(undo), around_backwards(unwatched):
            frames._maybe_set_eval_frame = set_frame_and_class
            yield
