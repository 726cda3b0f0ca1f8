"""Examples that lose a process: ``python -m tests.distributed.faulty EXAMPLE FAULT ARCHIVE [ITS ARGUMENTS] [-- …]``.

FAULT is where: ``ascent``, ``descent`` or ``saving``; or ``nowhere``, which is a script for torchrun. Every checkpoint
is copied to ARCHIVE as it appears. torchrun's own launcher starts the processes, and starts them again; it forks them,
so that all is imported once, for the runs up to each ``--`` one after the other.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.distributed.launching import runs

PASSES = 2 * 15  # of an epoch
FATAL_EPOCH = 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def first_life(rank: int) -> bool:
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == rank


def loaded(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example


def run(example: ModuleType, fault: str, archive: Path, *arguments: str) -> None:
    """One process of the example."""
    sys.argv = [example.__file__, *arguments]
    archive.mkdir(exist_ok=True)
    calls = 0
    cross_entropy, save, dcp_save, replace, rename = (
        example.cross_entropy,
        torch.save,
        dcp.save,
        os.replace,
        Path.rename,
    )

    def fatal_loss(*arguments):
        nonlocal calls
        calls += 1
        into_the_epoch = {"ascent": 5, "descent": 6}.get(fault)
        if into_the_epoch and calls == PASSES * FATAL_EPOCH + into_the_epoch and first_life(rank=1):
            die()
        return cross_entropy(*arguments)

    def fatal_save(state, file):
        save(state, file)
        if fault == "saving" and first_life(rank=0) and state["epoch"] == FATAL_EPOCH:
            Path(file).write_bytes(Path(file).read_bytes()[:1000])
            die()

    def fatal_dcp_save(state, checkpoint_id):
        dcp_save(state, checkpoint_id=checkpoint_id)
        if fault == "saving" and first_life(rank=1) and calls > PASSES * FATAL_EPOCH:
            for part in checkpoint_id.glob("*.distcp"):
                part.write_bytes(part.read_bytes()[:1000])
            die()

    def archived_replace(source, target):
        replace(source, target)
        shutil.copy(target, archive / f"epoch-{torch.load(target)['epoch']:04}")

    def archived_rename(source, target):
        rename(source, target)
        if Path(source).name == "partial":  # the checkpoint itself, not one of its files
            shutil.copytree(target, archive / target.name, dirs_exist_ok=True)

    example.cross_entropy, torch.save, dcp.save = fatal_loss, fatal_save, fatal_dcp_save
    os.replace, Path.rename = archived_replace, archived_rename
    example.main()


def launch(path: str, fault: str, archive: str, *arguments: str) -> None:
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=Path(archive).parent.name,
    )
    elastic_launch(how, run)(loaded(path), fault, Path(archive), *arguments)


def main() -> None:
    if "RANK" in os.environ:
        path, fault, archive, *arguments = sys.argv[1:]
        run(loaded(path), fault, Path(archive), *arguments)
        return
    for words in runs(sys.argv[1:]):
        print(f"run of {words[2]}", flush=True)
        launch(*words)


if __name__ == "__main__":
    main()
