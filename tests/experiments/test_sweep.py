"""nusam sweep: what its options mean, and what it refuses."""

import subprocess
import sys

import pytest

from nusam.experiments.commands.main import main
from nusam.experiments.commands.sweep import Sweep
from nusam.experiments.training import loop

SMALL = ("--train-size", "64", "--epochs", "1", "--seeds", "1", "--rhos", "0.1")


@pytest.fixture
def sweep(monkeypatch, tmp_path, capsys):
    """The command: its exit code, what it said, and what it complained of."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nusam", "sweep", "--results", str(tmp_path / "results"), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def test_the_stored_runs_of_earlier_versions_are_found():
    options = {"models": ("mixer", "vit"), "seeds": 1, "rhos": (0.1,), "delays": (0.2,)}
    keys = ["0ea5768142a2ea2e", "321e07a7769cd551", "15f480895224ea9d"]
    keys += ["ca79e7909ecdb1c7", "bd8bd8eca1143485", "e2d77f127ade7cae"]
    assert [cell.key for cell in Sweep(**options).cells()] == keys
    assert [cell.key for cell in Sweep(**options, methods=("adamw", "sam", "nusam")).cells()] == keys


def test_every_option_reaches_the_recipe():
    given = {"base": "sgd", "batch_size": 16, "weight_decay": 0.1, "augment": "crop", "epochs": 3}
    for cell in Sweep(**given).cells():
        assert {name: getattr(cell.recipe, name) for name in given} == given


def test_one_pass_is_for_the_runs_that_can_take_it():
    options = {"methods": ("none", "sam", "nusam", "nusam-norm"), "rhos": (0.1,), "seeds": 1}
    cells = Sweep(**options, one_pass=True).cells()
    assert [cell.run.one_pass for cell in cells] == [False, False, True, True]
    assert [cell.key for cell in cells[:2]] == [cell.key for cell in Sweep(**options).cells()[:2]]


def test_one_pass_is_said_in_the_table(sweep):
    code, said, _ = sweep(*SMALL, "--methods", "nusam", "--ascent-shares", "0.25", "--one-pass", "--jobs", "1")
    assert (code, "one pass" in said) == (0, True)


def test_other_options_are_other_runs(sweep):
    code, said, _ = sweep(*SMALL, "--methods", "none", "sam", "--jobs", "1")
    assert (code, "2 runs, 0 of them finished" in said) == (0, True)
    code, said, _ = sweep(*SMALL, "--methods", "adamw", "sam", "--jobs", "1")
    assert (code, "2 runs, 2 of them finished" in said) == (0, True)
    sgd = ("--base", "sgd", "--batch-size", "16", "--weight-decay", "0", "--augment", "crop")
    code, said, _ = sweep(*SMALL, "--methods", "none", "sam", *sgd, "--jobs", "1")
    assert (code, "2 runs, 0 of them finished" in said) == (0, True)
    assert "SGD" in said
    assert "AdamW" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--models",), "--models must name some of mixer, vit,"),
        (("--methods", "magic"), "--methods must name some of none, adamw, sam,"),
        (("--methods", "adamw", "--base", "sgd"), "--methods adamw and --base sgd are two base optimizers"),
        (("--one-pass", "--methods", "none", "sam"), "--one-pass is for nusam and nusam-norm, got none, sam; leave it"),
        (("--rhos",), "--rhos must give at least one radius, got nothing."),
        (("--rhos", "-0.1"), "rho must be finite and at least 0, got -0.1."),
        (("--rhos", "nan"), "rho must be finite and at least 0, got nan."),
        (("--delays", "1.5"), "delay is a share of the steps"),
        (("--delays", "-0.5"), "delay is a share of the steps"),
        (("--learning-rate", "-1"), "learning rate must be finite and at least 0, got -1.0."),
        (("--train-size", "-5"), "train size must be at least 0, got -5."),
        (("--jobs", "0"), "jobs must be at least 1, got 0."),
        (("--seeds", "0"), "seeds must be at least 1, got 0."),
        (("--epochs", "0"), "epochs must be at least 1, got 0."),
        (("--batch-size", "0"), "batch size must be at least 1, got 0."),
        (("--base", "lion"), "--base must be one of sgd, adam, adamw, adafactor, got lion."),
        (("--augment", "blur"), "--augment must be one of none, crop,"),
        (("--engine", "steam"), "--engine must be one of local, ray, got steam."),
        (("--data", "sentences", "--models", "bert-tiny", "--augment", "crop"), "--augment crop is for images"),
        (("--data", "cifar10", "--data-root", "/nowhere"), "point --data-root to them, or let --download fetch them."),
    ],
)
def test_what_it_refuses(sweep, arguments, sentence, tmp_path):
    code, _, complaint = sweep("--train-size", "64", *arguments)
    assert code == 2
    assert sentence in complaint
    assert len(complaint.strip().splitlines()) == 1
    assert not (tmp_path / "results" / "runs.jsonl").exists() or not (tmp_path / "results/runs.jsonl").read_bytes()


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_sentence_too(sweep, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of the workers
    small = ["--train-size", "64", "--epochs", "1", "--methods", "sam", "--rhos", "0.1", "--seeds", "2", "--jobs", "2"]
    code, _, complaint = sweep("--models", "vit-s/16", *small)
    assert code == 2
    assert "could not be loaded" in complaint
    assert len(complaint.splitlines()) == 1, complaint


def test_a_second_sweep_on_a_folder_is_refused_before_it_trains(sweep, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    trained = []
    monkeypatch.setattr(loop, "train", lambda *given, **more: trained.append(given))
    hold = "import sys; from pathlib import Path; from nusam.experiments.runs.store import Store\n"
    hold += "with Store(Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "results")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        code, _, complaint = sweep(*SMALL, "--jobs", "1")
        other.kill()
    assert (code, trained) == (2, [])
    assert f"The results folder {tmp_path / 'results'} is being filled by another process" in complaint
