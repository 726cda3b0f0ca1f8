"""Every experiment of the paper runs at the smallest scale, from the command line."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest

from nusam.experiments.commands.reproduce import NAMES, experiment
from nusam.experiments.errors import Refused
from nusam.experiments.pages.result import read_all
from nusam.experiments.training import step_time
from tests.experiments.commands import nusam
from tests.experiments.full_disks import files_of_at_most


def reproduce(*arguments, check=True, largest=None):
    """The command; with ``largest``, a longer file can't be written, as on a disk that is full."""
    with nullcontext() if largest is None else files_of_at_most(largest):
        return nusam("reproduce", "--jobs", "1", *arguments, check=check)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder that the experiments share, as a user's would be."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, results, monkeypatch):
    monkeypatch.setattr(step_time, "ROUNDS", 1)  # of which table14 takes the medians
    said = reproduce(name, "--scale", "smoke", "--results", results).stdout
    assert "Saved as" in said
    (result,) = [result for result in read_all(results) if result.name == name]
    assert result.scale == "smoke"
    assert result.rows
    assert set(result.columns) <= set().union(*result.rows)
    assert result.findings
    assert {"device", "date", "torch", "command"} <= result.circumstances.keys()
    assert any(re.search(r"\bours\b", note, re.IGNORECASE) for note in result.notes)


@pytest.mark.slow
def test_a_process_of_its_own_says_and_keeps_the_same(results, tmp_path):
    """The other tests run commands in this process, which has imported everything before."""
    here = reproduce("table3", "--scale", "smoke", "--results", results)
    command = [sys.executable, "-W", "error", "-m", "nusam.experiments.commands.main", "reproduce", "--jobs", "1"]
    command += ["table3", "--scale", "smoke", "--results", str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True)
    assert there.stderr == here.stderr == ""
    title = experiment("table3").title
    tables = [done.stdout[done.stdout.index(title) : done.stdout.index("Saved as")] for done in (here, there)]
    assert tables[0] == tables[1]
    files = [(folder / "runs.jsonl").read_text().splitlines() for folder in (results, tmp_path)]
    ours, theirs = ([json.loads(line) for line in lines] for lines in files)
    kept = {row["key"]: (row["epochs"], row["validation_accuracy"]) for row in ours}
    assert {row["key"]: (row["epochs"], row["validation_accuracy"]) for row in theirs}.items() <= kept.items()


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
        (["table3", "--scale", "cpu", "--data", "cifar10"], "point --data-root to them, or let --download fetch them."),
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


def assert_one_sentence(refused, *parts):
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert all(part in refused.stderr for part in parts), refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["fig1", "table3"])
def test_a_full_disk_keeps_what_was_finished(name, tmp_path):
    size = 3_000 if name == "table3" else 1_000  # some of the rows, or a part of the result
    refused = reproduce(name, "--scale", "smoke", "--results", tmp_path, check=False, largest=size)
    assert_one_sentence(refused, "could not be written", "run the command again: what was finished is kept.")
    assert {path.name for path in tmp_path.iterdir()} <= {"runs.jsonl", f"{name}-smoke-digits.md", f"{name}-smoke.md"}
    kept = len((tmp_path / "runs.jsonl").read_bytes().splitlines())
    said = reproduce(name, "--scale", "smoke", "--results", tmp_path)
    assert "Saved as" in said.stdout
    if name == "table3":
        assert kept
        (result,) = read_all(tmp_path)
        assert result.circumstances["runs"] == f"{8 - kept} made here, {kept} found finished"


def test_a_full_disk_while_weights_are_written_leaves_none(tmp_path):
    refused = reproduce("table4", "--scale", "smoke", "--results", tmp_path, check=False, largest=20_000)
    assert_one_sentence(refused, "could not be written (File too large)")
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("damage", ["no run", "weights", "folder"])
def test_a_broken_store_is_refused(damage, tmp_path, results):
    reproduce("table4", "--scale", "smoke", "--results", results)
    (tmp_path / "weights").mkdir()
    for path in (results / "weights").iterdir():
        (tmp_path / "weights" / path.name).write_bytes(b"no weights" if damage == "weights" else path.read_bytes())
    if damage == "no run":
        row = json.loads((results / "runs.jsonl").read_bytes().splitlines()[0])
        del row["validation_accuracy"]
        (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    elif damage == "folder":
        (tmp_path / "runs.jsonl").mkdir()
    refused = reproduce("table4", "--scale", "smoke", "--results", tmp_path, check=False)
    said = {"no run": "line 1, is no finished run", "weights": "that can be read", "folder": "(Is a directory)"}
    assert_one_sentence(refused, str(tmp_path), said[damage])


@pytest.mark.parametrize("content", ["{", '{"name": "fig1", "curves": []}', "[]"])
def test_a_broken_file_is_named_by_the_list(content, tmp_path):
    (tmp_path / "fig1-smoke.json").write_text(content)
    assert_one_sentence(reproduce("--list", "--results", tmp_path, check=False), "fig1-smoke.json is no saved result")


def test_download_is_passed_on(tmp_path, monkeypatch):
    from nusam.experiments.runs import filling

    asked = []

    def load(name, root, train_size, download):
        asked.append(download)
        raise Refused("enough.")

    monkeypatch.setattr(filling, "load", load)
    for options in ([], ["--download"]):
        assert reproduce("table3", "--scale", "smoke", "--results", tmp_path, *options, check=False).returncode == 2
    assert asked == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_needs_and_how_long_it_takes(name):
    known = experiment(name)
    assert known.name == name
    assert known.title
    assert {"smoke", "cpu", "full"} <= known.takes.keys()


@pytest.mark.slow
def test_the_study_runs_at_the_smallest_scale_and_no_paper_table_at_its_own(tmp_path):
    said = reproduce("study", "--scale", "smoke", "--results", tmp_path).stdout
    assert "H6, νSAM at 1/8 above νSAM − 0.3" in said
    assert "Mixer, 20%" in said
    assert "got desk" in reproduce("table3", "--scale", "desk", "--results", tmp_path, check=False).stderr
