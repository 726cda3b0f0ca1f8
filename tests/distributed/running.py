"""Runs checks in processes, and writes what they said into a file.

``python -m tests.distributed.launching N tests.distributed.running FILE.json MODULE[,MODULE ...] [WORD ...]``

Starting processes takes longer than most checks, so all those for N processes run in one start, and the tests read
what each of them said.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.engines import DEVICE
from tests.distributed.launching import forked

Check = Callable[[], Any]
Checks = dict[int, dict[str, Check]]
CHECKS: Checks = {2: {}, 4: {}}


def check(*world_sizes: int, among: Checks = CHECKS) -> Callable[[Check], Check]:
    """Register a check for these numbers of processes."""

    def register(function: Check) -> Check:
        for size in world_sizes:
            among[size][function.__name__] = function
        return function

    return register


def checks_of(modules: list[str], processes: int) -> Iterator[tuple[str, str, Check]]:
    """Of each module's checks for so many processes the module, the name and what to run."""
    for module in modules:
        checks: Checks = import_module(f"tests.distributed.{module}").CHECKS
        for name, run in checks.get(processes, {}).items():
            yield module, name, run


def answers_of(processes: int, *modules: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the checks of some modules said, each by its name, in processes that are started once."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "answers.json"
        forked(processes, "tests.distributed.running", (str(said), ",".join(modules), *words))
        answers: dict[str, Any] = json.loads(said.read_text())
    return answers


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=600))
    results: dict[str, Any] = {}
    modules, *wanted = sys.argv[2:]
    for module, name, run in checks_of(modules.split(","), dist.get_world_size()):
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            answer: Any = {"value": run()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
        failed = [a for a in answers if "error" in a]
        results.setdefault(module, {})[name] = failed[0] if failed else answers[0]
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()  # a process that leaves early takes what the others still wait for
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # all is said; threads of the backends may abort a process that ends under load
