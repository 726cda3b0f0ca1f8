"""A sweep on a Ray cluster ends as on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.commands import nusam
from tests.experiments.test_store import rows

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
SMALL = ("sweep", "--rhos", "0.1", "--train-size", "64", "--jobs", "2")
FILLING = (*SMALL, "--methods", "adamw", "nusam", "--seeds", "4", "--epochs", "2")
REFUSED = (*SMALL, "--methods", "sam", "--seeds", "2", "--epochs", "1", "--models", "vit-s/16")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The folders of two sweeps on one cluster, of which the second can't have its models, and what they said."""
    from tests.experiments.on_a_cluster import PATIENT

    folder = tmp_path_factory.mktemp("cluster")
    filled, empty = folder / "filled", folder / "empty"
    lines, answers = folder / "lines.json", folder / "answers.json"
    there = ("--engine", "ray", "--results")
    lines.write_text(json.dumps([[*FILLING, *there, str(filled)], [*REFUSED, *there, str(empty)]]))
    subprocess.run(
        [sys.executable, "-m", "tests.experiments.on_a_cluster", lines, answers],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **PATIENT, "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # where Ray says that it has started
    )
    return filled, empty, json.loads(answers.read_text())


def test_a_cluster_fills_the_store_as_this_machine_does(cluster, tmp_path):
    there, _, (done, _) = cluster
    assert done["returncode"] == 0, done["stderr"]
    nusam(*FILLING, "--results", tmp_path)
    assert len(rows(there)) == 8
    assert rows(there) == rows(tmp_path)


def test_what_a_task_refuses_is_one_sentence(cluster):
    _, there, (_, refused) = cluster
    assert refused["returncode"] == 2
    assert "could not be loaded" in refused["stderr"]
    assert len(refused["stderr"].splitlines()) == 1
    assert rows(there) == []
