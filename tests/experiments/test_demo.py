"""The command, end to end."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nusam.experiments.commands import main as command
from nusam.experiments.recipes import demo as recipe
from nusam.experiments.recipes.demo import CONTENDERS, collapsed
from nusam.experiments.training.data import load
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Run

NUSAM = Path(sysconfig.get_path("scripts")) / "nusam"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    done = demo(out / "deep", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    return out / "deep", done


def demo(out, *options):
    """Epochs and images for seconds."""
    small = ["--epochs", "2", "--train-size", "64", "--out", out]
    return subprocess.run([NUSAM, "demo", *small, *options], capture_output=True, text=True, cwd=out.parent)


def runs_of(out):
    """What the store holds: (model, method, share, ρ, seed) and the run."""
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = [(row["cell"]["run"], row) for row in rows]
    return {(run["model"], run["method"], run["ascent_share"], run["rho"], run["seed"]): row for run, row in runs}


@pytest.mark.slow
def test_the_demo_prints_a_table(finished):
    _, done = finished
    assert done.stderr == ""
    for word in ("Mixer", "ViT", "AdamW", "AdamW, best epoch", "νSAM at 1/8", "40% of the labels", "±", "1.08", "2.00"):
        assert word in done.stdout


@pytest.mark.slow
def test_the_demo_leaves_a_table_and_a_figure(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "demo-digits.json",
        "demo-digits.md",
        "demo.png",
        "runs.jsonl",
    ]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_table_is_what_the_runs_say(finished):
    out, _ = finished
    rows = {(row["model"], row["method"]): row for row in json.loads((out / "demo-digits.json").read_text())["rows"]}
    runs = runs_of(out)
    assert len(rows) == 10
    for model, title in (("mixer", "Mixer"), ("vit", "ViT")):
        alone = [runs[model, "adamw", 1.0, 0.0, seed]["epochs"] for seed in (0, 1)]
        scored = [[epoch for epoch in epochs if len(epoch) > 1] for epochs in alone]
        assert [len(epochs) for epochs in scored] == [len(epochs) // 2 + len(epochs) % 2 for epochs in alone]
        base = [[100 * epoch[1] for epoch in epochs] for epochs in scored]
        validation = [[epoch[2] for epoch in epochs] for epochs in scored]
        best = [test[int(np.argmax(seen))] for test, seen in zip(base, validation, strict=True)]
        last = [test[-1] for test in base]
        assert rows[title, "AdamW"]["accuracy"].startswith(f"{np.mean(last):.2f} ± ")
        assert rows[title, "AdamW, best epoch"]["accuracy"].startswith(f"{np.mean(best):.2f} ± ")
        for method, share, label in (("sam", 1.0, "SAM"), ("nusam", 1.0, "νSAM"), ("nusam", 1 / 8, "νSAM at 1/8")):
            first = {key[3]: row for key, row in runs.items() if (*key[:3], key[4]) == (model, method, share, 0)}
            tried = {rho: row["validation_accuracy"] for rho, row in first.items()}
            assert len(tried) == 3
            chosen = max(sorted(tried), key=lambda rho: tried[rho])
            own = [100 * runs[model, method, share, chosen, seed]["epochs"][-1][1] for seed in (0, 1)]
            gains = np.subtract(own, last)
            assert rows[title, label]["ρ"] == f"{chosen:g}"
            assert rows[title, label]["over AdamW"] == f"{gains.mean():+.2f} ± {gains.std(ddof=1) / 2**0.5:.2f}"
        works = [rows[title, label]["work"] for label in ("AdamW", "AdamW, best epoch", "SAM", "νSAM", "νSAM at 1/8")]
        assert works == ["1.00", "1.00", "2.00", "1.67", "1.08"]
        assert rows[title, "AdamW"]["floats of ε"] == "0"
        assert float(rows[title, "SAM"]["time"]) > 1


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(finished):
    out, _ = finished
    before = (out / "runs.jsonl").read_bytes()
    again = demo(out, "--seeds", "2")
    assert again.returncode == 0, again.stderr
    assert (out / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_images_of_ones_own_keep_their_labels(tmp_path):
    drawn = np.random.default_rng(0)
    for part, kind, number in [(p, k, n) for p in ("train", "test") for k in ("cat", "dog") for n in range(8)]:
        folder = tmp_path / "data" / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    options = ["--data", "folder", "--data-root", tmp_path / "data", "--train-size", "8", "--seeds", "1"]
    done = demo(tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "drawn anew" not in done.stdout
    recipes = [row["cell"]["recipe"]["wrong_labels"] for row in runs_of(tmp_path / "out").values()]
    assert set(recipes) == {0.0}


@pytest.mark.parametrize(
    ("guessing", "good", "bad"), [(50.0, 57.0, 53.0), (33.4, 65.0, 36.0), (90.0, 91.5, 90.0), (10.0, 20.0, 11.0)]
)
def test_what_is_near_chance_is_told_in_one_line(guessing, good, bad):
    """Of two classes or three too, where twice the accuracy of guessing would be perfect."""
    labels = [contender.label for contender in CONTENDERS]
    every = {label: [good, good] for label in labels}
    assert collapsed("ViT", every, guessing) == []
    (line,) = collapsed("ViT", {**every, "AdamW": [bad, good], "AdamW, best epoch": [bad, bad]}, guessing)
    assert line == f"- ViT: 1 of 2 of AdamW ended near chance, which is {guessing:.0f}%: too few epochs."
    (line,) = collapsed("ViT", {**every, "SAM": [bad, bad], "νSAM": [bad, good]}, guessing)
    assert "- ViT: 2 of 2 of SAM and 1 of 2 of νSAM ended near chance" in line
    assert line.endswith("too few epochs, or ρ is too large.")


def test_nobody_knows_whether_labels_of_ones_own_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.Contest, "outcomes", lambda self, store, label: [OUTCOME])
    monkeypatch.setattr(recipe.Contest, "radius", lambda self, store, label: 0.1)
    monkeypatch.setattr(recipe.Bench, "hold", lambda self, contests: None)
    monkeypatch.setattr(recipe, "_seconds", lambda contest, bench, source: dict.fromkeys(contest.contenders, 1.0))
    bench = recipe.Bench(None, "", "", tmp_path, 1, "cpu", None)
    source = load("digits", tmp_path)
    for data, wrong, said in (
        ("folder", 0.0, "797 test images, after"),
        ("folder", 0.4, "whose labels are as they were given, after"),
        ("digits", 0.4, "whose labels are right, after"),
    ):
        result = recipe.Demo(data, Recipe(1, wrong_labels=wrong), 1, None).run(bench, source)
        assert said in result.notes[0]


OUTCOME = Outcome(Run("mixer", "adamw", 0.0, 0), [Epoch(0.1, 0.9, 0.9)], 0.9, 0, 0, 1.0)


@pytest.fixture
def running(tmp_path):
    """A demo in a process group of its own, after its first finished run."""
    options = ["--epochs", "3", "--train-size", "64", "--seeds", "500", "--out", tmp_path]
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
        assert "Stopped; " in stdout
        assert f"{runs_finished(out)} finished runs" in stdout
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
        (["--wrong-labels", "1.5"], ("wrong labels", "at most 1", "1.5")),
        (["--train-size", "-1"], ("train size", "at least 0", "-1")),
        (["--epochs", "0"], ("--epochs", "at least 1", "0")),
        (["--seeds", "-3"], ("--seeds", "at least 1", "-3")),
        (["--jobs", "0"], ("--jobs", "at least 1", "0")),
        (["--device", "cuda:99"], ("--device", "cpu", "cuda:99")),
        (["--device", "abacus"], ("--device", "cpu", "abacus")),
        (["--out", "a file/demo"], ("a file/demo", "another folder")),
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
    """That the store holds."""
    path = out / "runs.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


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


@pytest.mark.slow
def test_what_is_to_be_said_of_the_data_is_said_once(tmp_path):
    """Though the demo loads it for every search and every row."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("eel", "fox"):
            folder = tmp_path / "own" / part / name
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = generator.integers(0, 255, (8, 8), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "own" / "train" / "eel" / "notes.txt").write_text("caught in May")
    done = demo(tmp_path / "out", "--data", "folder", "--data-root", tmp_path / "own", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 file that is no image is passed over (.txt).") == 1
