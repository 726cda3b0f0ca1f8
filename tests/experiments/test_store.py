"""What was finished is never run again, and survives whatever ends a sweep."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from nusam.experiments.errors import Refused
from nusam.experiments.store import Cell, Store
from nusam.experiments.training import Epoch, Outcome, Recipe, Run

CPU = torch.device("cpu")
CELL = Cell("digits", Recipe(2), Run("mixer", "nusam", 0.1, seed=0), 64)
SWEEP = ["-m", "nusam.experiments.command", "sweep", "--methods", "adamw", "nusam", "--rhos", "0.1", "--seeds", "4"]
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


def test_a_line_that_a_crash_cut_short_is_forgotten(tmp_path):
    Store(tmp_path).add(CELL, outcome(CELL), CPU)
    whole = (tmp_path / "runs.jsonl").read_bytes()
    second = replace(CELL, run=Run("mixer", "nusam", 0.1, seed=1))
    Store(tmp_path).add(second, outcome(second), CPU)
    torn = (tmp_path / "runs.jsonl").read_bytes()[: len(whole) + 50]
    (tmp_path / "runs.jsonl").write_bytes(torn)
    store = Store(tmp_path)
    assert CELL in store
    assert second not in store
    assert (tmp_path / "runs.jsonl").read_bytes() == whole


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(Refused, match="line 1, is no finished run; remove it, or name another folder"):
        Store(tmp_path)


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
    second = replace(CELL, run=Run("mixer", "nusam", 0.1, seed=1))
    with pytest.raises(Refused, match=r"No space left on device.*what was finished is kept"):
        store.add(second, outcome(second), CPU)
    assert second not in store
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def rows(folder):
    """The store's rows, times aside."""
    import json

    lines = (folder / "runs.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_the_same_store(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, *SWEEP, "--results", str(whole)], check=True, capture_output=True)
    assert len(rows(whole)) == 8
    command = [sys.executable, *SWEEP, "--results", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not ((killed / "runs.jsonl").exists() and rows(killed)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(rows(killed)) < 8
    subprocess.run(command, check=True, capture_output=True)
    assert rows(killed) == rows(whole)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "8 runs, 8 of them finished" in again.stdout


@pytest.mark.slow
def test_a_cluster_fills_the_store_as_this_machine_does(tmp_path):
    pytest.importorskip("ray")
    here, there = tmp_path / "here", tmp_path / "there"
    small = [argument if argument != "12" else "2" for argument in SWEEP]
    subprocess.run([sys.executable, *small, "--results", str(here)], check=True, capture_output=True)
    cluster = [sys.executable, *small, "--engine", "ray", "--results", str(there)]
    subprocess.run(cluster, check=True, capture_output=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    assert rows(there) == rows(here)
