"""The command, end to end."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from nusam.experiments.commands import main as command

NUSAM = Path(sysconfig.get_path("scripts")) / "nusam"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    options = ["--methods", "adamw,nusam", "--seeds", "2", "--epochs", "3", "--rho", "0.05", "--ascent-share", "0.5"]
    done = subprocess.run([NUSAM, "demo", *options, "--out", out / "deep"], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    return out / "deep", done


@pytest.mark.slow
def test_the_demo_prints_a_table(finished):
    _, done = finished
    assert done.stderr == ""
    for word in ("Mixer", "ViT", "AdamW", "νSAM", "step", "floats", "±", "1.00×"):
        assert word in done.stdout


@pytest.mark.slow
def test_the_demo_leaves_a_figure_and_nothing_unfinished(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "results.json"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results_hold_settings_runs_and_the_table(finished):
    results = json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))
    assert results["options"]["seeds"] == 2
    assert results["options"]["rho"] == 0.05
    assert results["options"]["ascent_share"] == 0.5
    assert results["recipe"]["epochs"] == 3
    assert results["device"].split(" (")[0] == "cpu"
    assert {"python", "torch", "timm", "nusam"} == set(results["versions"])
    assert results["runs_finished"] == results["runs_planned"] == 2 * 2 * 2
    runs = {(run["model"], run["method"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(m, o, s) for m in ("mixer", "vit") for o in ("adamw", "nusam") for s in (0, 1)}
    for run in runs.values():
        assert len(run["train_loss"]) == len(run["test_accuracy_curve"]) == 3
        assert run["test_accuracy"] == run["test_accuracy_curve"][-1]
        assert run["rho"] == (0.05 if run["method"] == "nusam" else 0)
    rows = {(row["model"], row["method"]): row for row in results["table"]}
    assert rows["mixer", "adamw"]["relative_step_time"] == 1
    assert rows["mixer", "nusam"]["relative_step_time"] > 1
    assert rows["mixer", "adamw"]["perturbation_numel"] == 0
    assert rows["mixer", "nusam"]["perturbation_numel"] > 0
    mean = (runs["vit", "nusam", 0]["test_accuracy"] + runs["vit", "nusam", 1]["test_accuracy"]) / 2
    assert rows["vit", "nusam"]["test_accuracy"] == pytest.approx(mean)


@pytest.fixture
def running(tmp_path):
    """A demo in a process group of its own, after its first finished run."""
    options = ["--methods", "adamw,nusam", "--rho", "0.05", "--epochs", "3", "--seeds", "500", "--out", tmp_path]
    process = subprocess.Popen(
        [NUSAM, "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell would have it ignored
    )
    try:
        wait_until(lambda: process.poll() is not None or runs_finished(tmp_path) >= 1)
        assert process.poll() is None, process.stderr.read()
        yield process, tmp_path
    finally:
        if process_group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups and SIGINT are POSIX")
class TestStopping:
    """Ctrl-C, and worse."""

    def test_ctrl_c_keeps_what_was_finished(self, running):
        process, out = running
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
        stdout, stderr = process.communicate()
        assert process.returncode == 130
        assert stderr == ""
        assert "Stopped after" in stdout
        assert "AdamW" in stdout
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        assert 1 <= results["runs_finished"] == len(results["runs"]) < results["runs_planned"] == 2000
        assert results["table"]
        assert (out / "demo.png").exists()
        wait_until(lambda: not process_group_exists(process.pid))

    def test_workers_end_with_a_killed_parent(self, running):
        process, _ = running
        process.kill()
        process.wait()
        wait_until(lambda: not process_group_exists(process.pid))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "mnist"], ("--data", "mnist", "digits, fashion-mnist, cifar10")),
        (["--data", "cifar10", "--data-root", "nowhere"], ("cifar10", "nowhere", "--data-root")),
        (["--data", "fashion-mnist", "--data-root", "nowhere"], ("fashion-mnist", "nowhere", "dataset-fashion-mnist")),
        (["--methods", "adamw,sgd"], ("--methods", "sgd", "adamw, sam, sam-on, nusam")),
        (["--methods", ","], ("--methods", "adamw, sam, sam-on, nusam")),
        (["--epochs", "0"], ("--epochs", "at least 1", "0")),
        (["--seeds", "-3"], ("--seeds", "at least 1", "-3")),
        (["--jobs", "0"], ("--jobs", "at least 1", "0")),
        (["--rho", "-0.1"], ("--rho", "positive", "-0.1")),
        (["--rho", "nan"], ("--rho", "positive", "nan")),
        (["--device", "cuda:99"], ("--device", "cpu", "cuda:99")),
        (["--device", "abacus"], ("--device", "cpu", "abacus")),
        (["--out", "a file/demo"], ("--out", "a file/demo", "another folder")),
    ],
)
def test_refusals_are_one_sentence(options, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nusam.experiments.training.data.DEBIAN_FASHION_MNIST", tmp_path / "absent")
    Path("a file").touch()
    message = refusal(["demo", *options], monkeypatch, capsys)
    for word in words:
        assert word in message
    assert message.count("\n") == 1


def test_a_missing_dependency_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(command, "REQUIRED", ("rich", "surely_not_installed"))
    message = refusal(["demo"], monkeypatch, capsys)
    assert "surely_not_installed" in message
    assert 'pip install "nusam[experiments]"' in message


def refusal(arguments, monkeypatch, capsys):
    """What the command says when it exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["nusam", *arguments])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def runs_finished(out: Path) -> int:
    """According to results.json, which is whole whenever it is there."""
    path = out / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs_finished"] if path.exists() else 0


def process_group_exists(group: int) -> bool:
    """Whether any process of it is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition) -> None:
    """Poll; how long is too long depends on who else is at work, and is left to the limit of every test."""
    while not condition():
        time.sleep(0.05)
