"""Starts several processes: scripts as users start them, modules of ours by forking, which imports once for all.

``python -m tests.distributed.launching PROCESSES MODULE ARGUMENT ... [-- ARGUMENT ...]`` calls the module's ``main`` in
so many processes, with the environment that torchrun gives them; once for the arguments up to each ``--``.
"""

import gc
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
# a store shared with the launcher keeps the addresses of processes that died (pytorch/pytorch#135712)
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(processes: int, script: str, *arguments: str) -> str:
    """Run a script in several processes; what it printed."""
    return python("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), script, *arguments)


def forked(processes: int, module: str, *runs: tuple[str, ...]) -> str:
    """Run a module's ``main`` in several processes, once for each tuple of arguments; what it printed."""
    arguments = [word for run in runs for word in ("--", *run)][1:]
    return python("tests.distributed.launching", str(processes), module, *arguments)


def python(*arguments: str) -> str:
    """Run a module; what it printed."""
    command = [sys.executable, "-m", *arguments]
    environment = {
        **os.environ,
        **FRESH_STORE,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def main() -> None:
    processes, module, *words = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    import_module(module)  # what processes need they have when they begin
    gc.freeze()  # and no search among all objects goes over it again
    from torch.distributed import TCPStore
    from torch.multiprocessing import start_processes

    failed = False
    for run in runs(words):
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # on a port that is free
        try:
            start_processes(_one, (store.port, module, run), nprocs=int(processes), start_method="fork")
        except Exception:
            traceback.print_exc()
            failed = True
    sys.exit(failed)


def runs(words: list[str]) -> list[list[str]]:
    """The words up to each ``--``."""
    found: list[list[str]] = [[]]
    for word in words:
        found.append([]) if word == "--" else found[-1].append(word)
    return found


def _one(rank: int, port: int, module: str, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    sys.argv = [module, *arguments]
    import_module(module).main()


if __name__ == "__main__":
    main()
