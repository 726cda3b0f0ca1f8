"""What the allocator holds while a program runs, read from a profiler's trace."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["Moment", "mark", "moments"]

_MARK = "mark "


class Moment(NamedTuple):
    """Bytes alive after an allocation or a release, or where the program passed a mark."""

    live: int
    mark: str = ""


def mark(name: str) -> None:
    """Pass a mark."""
    with record_function(_MARK + name):
        pass


def moments(program: Callable[[], object]) -> list[Moment]:
    """Run the program; every change of what it holds on the CPU, and every mark that it passed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        program()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    live = 0
    found = []
    for event in sorted((e for e in events if "ts" in e), key=lambda e: float(e["ts"])):
        if event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            found.append(Moment(live))
        elif event["name"].startswith(_MARK):
            found.append(Moment(live, event["name"].removeprefix(_MARK)))
    return found
