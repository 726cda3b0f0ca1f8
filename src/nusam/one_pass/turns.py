"""Two computations in turns: the other one runs in a thread of its own, and only while its owner waits for it."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Call", "Done", "Settings", "Turns"]

# the ways to attend, switched on and off for the process
ATTENTIONS: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]


class Call(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Done(NamedTuple):
    value: Any


class _Stop(BaseException):
    """Ends a computation that nobody waits for."""


class Turns:
    """A function in a thread of its own, which runs only while its owner waits for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._run = _in_this_setting(self._body)  # not in one that the owner makes meanwhile
        self._to: SimpleQueue[Any] = SimpleQueue()
        self._from: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def resume(self, answer: Any) -> Call | Done:
        """Hand over what it asked for; what it asks for next, or what it came to. What it raises is raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nusam-ahead", daemon=True)
            self._thread.start()
        else:
            self._to.put(answer)
        found = self._from.get()
        if isinstance(found, Call | Done):
            return found
        raise found

    def ask(self, request: Call) -> Any:
        """In the thread: wait for the answer."""
        self._from.put(request)
        answer = self._to.get()
        if answer is _Stop:
            raise _Stop
        return answer

    def waits(self) -> bool:
        """Whether it is somewhere in between."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End it, wherever it is."""
        if self._thread is not None:
            self._to.put(_Stop)
            self._thread.join()

    def _body(self) -> None:
        try:
            found: Any = Done(self._function())
        except _Stop:
            return
        except BaseException as error:
            found = error
        self._from.put(found)


class Settings:
    """What is set for the whole process, as each computation has set it: contexts that set it end in any order."""

    def __init__(self) -> None:
        self._of_the_other = self._now()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, as the second computation left it."""
        mine = self._now()
        self._set(self._of_the_other)
        try:
            yield
        finally:
            self._of_the_other = self._now()
            self._set(mine)

    @staticmethod
    def _now() -> tuple[torch.dtype, list[bool]]:
        return torch.get_default_dtype(), [is_enabled() for is_enabled, _ in ATTENTIONS]

    def _set(self, settings: tuple[torch.dtype, list[bool]]) -> None:
        if settings == self._now():
            return
        dtype, enabled = settings
        torch.set_default_dtype(dtype)
        for (_, enable), value in zip(ATTENTIONS, enabled, strict=True):
            enable(value)


def _in_this_setting(body: Callable[[], None]) -> Callable[[], None]:
    """The function as it would run here: gradients, autocast, device and stream are a thread's own."""
    context = contextvars.copy_context()
    grad = torch.is_grad_enabled()
    kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(kind)]
    autocasts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) for kind in kinds]
    default = torch.get_default_device()
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream() if started else None

    def run() -> None:
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            if default != torch.device("cpu"):
                stack.enter_context(default)
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, caches in autocasts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=caches))
            body()

    return lambda: context.run(run)
