"""What was finished is never run again, and survives whatever ends a sweep."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nusam.experiments import files
from nusam.experiments.errors import Refused
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Run
from tests.experiments.commands import nusam

CPU = torch.device("cpu")
CELL = Cell("digits", Recipe(2), Run("mixer", "nusam", 0.1, seed=0), 64)
SECOND = replace(CELL, run=replace(CELL.run, seed=1))
SWEEP = ["sweep", "--methods", "adamw", "nusam", "--rhos", "0.1", "--seeds", "4"]
SWEEP += ["--train-size", "64", "--epochs", "12", "--jobs", "2"]


def outcome(cell):
    return Outcome(cell.run, [Epoch(2.0, 0.25), Epoch(1.0, 0.5)], 0.4, 1, 99, 1.5)


def test_a_row_comes_back_as_it_was(tmp_path):
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    store = Store(tmp_path)
    assert CELL in store
    assert store[CELL] == outcome(CELL)
    other = replace(CELL, recipe=Recipe(3))
    assert other not in store
    assert other.key != CELL.key


def test_epochs_that_were_not_scored_come_back_as_they_were(tmp_path):
    cell = replace(CELL, recipe=Recipe(3, scored_every=2))
    scored = Outcome(cell.run, [Epoch(2.0), Epoch(1.5, 0.25, 0.2), Epoch(1.0, 0.5, 0.4)], 0.4, 1, 99, 1.5)
    Store(tmp_path).add(cell, scored, CPU)
    assert Store(tmp_path)[cell] == scored
    assert scored.test_accuracies == {2: 0.25, 3: 0.5}
    unfinished = replace(SECOND, recipe=cell.recipe)
    Store(tmp_path).add(unfinished, replace(scored, run=SECOND.run, epochs=[Epoch(2.0)]), CPU)
    with pytest.raises(Refused, match="is no finished run"):
        Store(tmp_path)


def test_a_line_that_a_crash_cut_short_is_forgotten(tmp_path):
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    whole = (tmp_path / "runs.jsonl").read_bytes()
    Store(tmp_path).add(SECOND, outcome(SECOND), CPU)
    torn = (tmp_path / "runs.jsonl").read_bytes()[: len(whole) + 50]
    (tmp_path / "runs.jsonl").write_bytes(torn)
    store = Store(tmp_path)
    assert CELL in store
    assert SECOND not in store
    assert (tmp_path / "runs.jsonl").read_bytes() == torn  # it may be what another process is writing
    with store.locked():
        assert (tmp_path / "runs.jsonl").read_bytes() == whole


def test_a_folder_that_another_process_fills_is_refused_until_that_ends_however_it_does(tmp_path):
    pytest.importorskip("fcntl")
    store = Store(tmp_path)
    hold = "import sys; from pathlib import Path; from nusam.experiments.runs.store import Store\n"
    hold += "with Store(Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(Refused, match=f"The results folder {tmp_path} is being filled by another process"):
            store.add(CELL, outcome(CELL), CPU)
        assert CELL not in store
        other.kill()
    store.add(CELL, outcome(CELL), CPU)
    store.add(SECOND, outcome(SECOND), CPU)
    assert len(rows(tmp_path)) == 2


def test_what_another_process_added_since_is_not_run_again(tmp_path):
    early = Store(tmp_path)
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    assert CELL not in early
    with early.locked(), early.locked():
        assert CELL in early
    early.add(CELL, outcome(CELL), CPU)
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("module", [None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=lambda *_: unsupported())])
def test_a_system_without_locks_is_no_hindrance(module, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", module)
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    assert CELL in Store(tmp_path)


def unsupported():
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_store_that_was_replaced_meanwhile_is_not_written_to_unseen(tmp_path):
    store = Store(tmp_path)
    with store.locked():
        store.add(CELL, outcome(CELL), CPU)
        (tmp_path / "runs.jsonl").rename(tmp_path / "moved.jsonl")
        with pytest.raises(Refused, match="could not be written"):
            store.add(SECOND, outcome(SECOND), CPU)
        (tmp_path / "runs.jsonl").touch()
        with pytest.raises(Refused, match="another file is in its place"):
            store.add(SECOND, outcome(SECOND), CPU)


def test_an_interrupt_leaves_no_part_of_a_row(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add(CELL, outcome(CELL), CPU)
    before = (tmp_path / "runs.jsonl").read_bytes()

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(SECOND, outcome(SECOND), CPU)
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"some": "thing"},
        lambda row: [row],
        lambda row: {**row, "cell": {**row["cell"], "run": {"model": "mixer"}}},
        lambda row: {**row, "cell": None},
        lambda row: {name: value for name, value in row.items() if name != "validation_accuracy"},
        lambda row: {**row, "validation_accuracy": None},
        lambda row: {**row, "epochs": []},
        lambda row: {**row, "epochs": [[0.5]]},
        lambda row: {**row, "epochs": [["a", "b"]]},
    ],
)
def test_a_line_that_is_no_run_is_refused(change, tmp_path):
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    row = json.loads((tmp_path / "runs.jsonl").read_text())
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(json.dumps(change(row)) + "\n")
    with pytest.raises(Refused, match="line 2, is no finished run; remove it, or name another folder"):
        Store(tmp_path)


def test_a_folder_in_the_stores_place_is_refused(tmp_path):
    (tmp_path / "runs.jsonl").mkdir()
    with pytest.raises(Refused, match=r"can't be written to \(Is a directory\); name another folder"):
        Store(tmp_path)


def test_a_row_names_the_processors_model(tmp_path):
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    device = json.loads((tmp_path / "runs.jsonl").read_text())["device"]
    known = (
        subprocess.run(["lscpu"], capture_output=True, text=True, env={"LC_ALL": "C"})
        if shutil.which("lscpu")
        else None
    )
    named = re.search(r"^Model name:\s*(.+?)\s*$", known.stdout, re.MULTILINE) if known else None
    assert device == f"cpu ({named[1]})" if named and named[1] != "-" else device.startswith("cpu")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])])
def test_broken_weights_are_refused(content, tmp_path):
    store = Store(tmp_path)
    store.weights("key").parent.mkdir()
    store.weights("key").write_bytes(content)
    with pytest.raises(Refused, match=r"weights/key\.pt holds no weights that can be read"):
        store.pretrained("key")


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"can't be written to .*; name another folder"):
        Store(tmp_path / "file")


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add(CELL, outcome(CELL), CPU)
    before = (tmp_path / "runs.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match=r"No space left on device.*what was finished is kept"):
        store.add(SECOND, outcome(SECOND), CPU)
    assert SECOND not in store
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def rows(folder):
    """The store's rows, times aside."""
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


KILLED = """
import os, signal
from nusam.experiments.commands.main import main
from nusam.experiments.runs.store import Store

add = Store.add

def add_and_die(*given):
    add(*given)
    os.killpg(0, signal.SIGKILL)

Store.add = add_and_die
main()
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_the_same_store(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    nusam(*SWEEP, "--results", whole)
    assert len(rows(whole)) == 8
    command = [sys.executable, "-c", KILLED, *SWEEP, "--results", str(killed)]
    assert subprocess.run(command, start_new_session=True, capture_output=True).returncode == -signal.SIGKILL
    assert 0 < len(rows(killed)) < 8
    nusam(*SWEEP, "--results", killed)
    assert rows(killed) == rows(whole)
    assert "8 runs, 8 of them finished" in nusam(*SWEEP, "--results", killed).stdout
