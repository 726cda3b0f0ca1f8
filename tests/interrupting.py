"""Raises inside the package at any bytecode, as a signal does."""

import dis
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nusam

PACKAGE = str(Path(nusam.__file__).parent)
Bytecode = tuple[CodeType, int]  # a function's code, and an offset in it
APART = 16


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no ``except Exception`` stops it."""


def bytecodes(run: Callable[[], Any]) -> list[Bytecode]:
    """Run, and list the bytecodes executed inside the package."""
    seen = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen.append((frame.f_code, frame.f_lasti))
        return trace

    _traced(run, trace)
    return seen


def interrupted(run: Callable[[], Any], bytecode: Bytecode, round_: int) -> bool:
    """Run, and raise before the bytecode's n-th round; whether it came to that."""
    code, offset = bytecode
    rounds = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal rounds
        if frame.f_code is not code:
            return None  # to trace one function alone takes half the time
        frame.f_trace_opcodes = True
        rounds += event == "opcode" and frame.f_lasti == offset
        if rounds == round_:
            sys.settrace(None)
            raise Interrupted
        return trace

    try:
        _traced(run, trace)
    except Interrupted:
        return True
    return False


def moments(executed: Counter[Bytecode], phase: int) -> Iterator[tuple[Bytecode, int]]:
    """Bytecodes and their rounds at which to interrupt.

    Python lets a signal in where a call has returned, a function begins or a loop goes round, and that is where
    something has been done and not yet noted: each of these, in its first and its last round. Of all others every
    sixteenth, of which ``phase`` says which, in one of the two.
    """
    others = 0
    for (code, offset), last in executed.items():
        if offset in _lets_signals_in(code):
            yield from (((code, offset), round_) for round_ in sorted({1, last}))
            continue
        others += 1
        if others % APART == phase % APART:
            yield (code, offset), last if others // APART % 2 else 1


@cache
def _lets_signals_in(code: CodeType) -> set[int]:
    instructions = list(dis.get_instructions(code))
    after = {
        instruction.offset
        for before, instruction in pairwise(instructions)
        if before.opname in ("RESUME", "BEFORE_WITH", "SETUP_WITH")
        or ("CALL" in before.opname and before.opname != "PRECALL")
    }
    return after | {i.argval for i in instructions if "JUMP" in i.opname and i.argval <= i.offset} | {0}


def _traced(run: Callable[[], Any], trace: Any) -> None:
    gc.disable()  # what earlier tests have left to be collected would be interrupted instead
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
        gc.enable()
