"""Where and with what a figure was measured; printed and written beside it."""

import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import nusam

RESULTS = Path(__file__).parent / "results"


def circumstances(device: str) -> dict[str, Any]:
    """Device, versions, date and command."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"{model}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nusam": nusam.__version__,
        "command": " ".join(["python", _what_runs(Path(sys.argv[0])), *sys.argv[1:]]),
    }


def _what_runs(script: Path) -> str:
    if script.name == "__main__.py":
        package = script.resolve().parent.relative_to(Path(__file__).resolve().parents[1])
        return f"-m {'.'.join(package.parts)}"
    return f"benchmarks/{script.name}"


def record(name: str, device: str, table: list[dict[str, Any]], notes: str) -> None:
    """Print a table as Markdown, and write it and its circumstances under ``results``."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in table]
    where = circumstances(device)
    text = "\n".join(
        [f"# {name}", "", notes, "", *lines, "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}-{device}"
    (RESULTS / f"{stem}.md").write_text(text)
    (RESULTS / f"{stem}.json").write_text(json.dumps({"circumstances": where, "table": table}, indent=1) + "\n")
