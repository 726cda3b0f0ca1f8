"""Every experiment of the paper runs at the smallest scale, from the command line."""

import subprocess
import sys

import pytest

from nusam.experiments.reproduce import NAMES, experiment
from nusam.experiments.result import read_all


def reproduce(*arguments, check=True):
    command = [sys.executable, "-m", "nusam.experiments.command", "reproduce", "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder that the experiments share, as a user's would be."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, results):
    said = reproduce(name, "--scale", "smoke", "--results", results).stdout
    assert "Saved as" in said
    (result,) = [result for result in read_all(results) if result.name == name]
    assert result.scale == "smoke"
    assert result.rows
    assert set(result.columns) <= set().union(*result.rows)
    assert result.findings
    assert {"device", "date", "torch", "command"} <= result.circumstances.keys()
    assert any("ours" in note.lower() for note in result.notes)


def test_a_second_time_nothing_is_run_again(results):
    reproduce("table3", "--scale", "smoke", "--results", results)
    before = (results / "runs.jsonl").read_bytes()
    reproduce("table3", "--scale", "smoke", "--results", results)
    assert (results / "runs.jsonl").read_bytes() == before
    (again,) = [result for result in read_all(results) if result.name == "table3"]
    assert again.circumstances["runs"] == "0 made here, 8 found finished"


def test_the_list_says_what_there_is_and_what_was_run(results):
    reproduce("fig1", "--scale", "smoke", "--results", results)
    said = reproduce("--list", "--results", results).stdout
    assert all(name in said for name in NAMES)
    assert "smoke" in said
    assert '"nusam[text]"' in said  # brackets are no markup


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["table99"], "nusam reproduce needs one of table1, table2"),
        ([], "got nothing; --list describes them."),
        (["table2", "--scale", "huge"], "--scale must be one of smoke, cpu, full, got huge."),
        (["table2", "--scale", "smoke", "--data", "cifar10"], "--data must be one of digits here, got cifar10."),
        (["table2", "--scale", "full", "--data", "cifar10"], "--data cifar10 needs the folders train and test"),
        (["table3", "--scale", "cpu", "--data", "cifar10"], "--data cifar10 needs the folders train and test"),
        (["table5", "--scale", "cpu"], "--data movie-reviews needs the file"),
        (["table2", "--results", "/proc/nowhere"], "can't be written to"),
    ],
)
def test_what_it_refuses(arguments, sentence, tmp_path):
    results = [] if "--results" in arguments else ["--results", tmp_path]
    refused = reproduce(*arguments, *results, check=False)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_needs_and_how_long_it_takes(name):
    known = experiment(name)
    assert known.name == name
    assert known.title
    assert {"smoke", "cpu", "full"} <= known.takes.keys()
