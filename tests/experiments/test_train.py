"""``nusam train``: what it leaves, how it stops, and how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nusam.experiments.data import load
from nusam.experiments.training import Recipe, Run, train
from tests.distributed.launching import torchrun

SMALL = ["--train-size", "128", "--epochs", "4", "--rho", "0.1"]
CPU = torch.device("cpu")


def nusam(*arguments, check=True):
    command = [sys.executable, "-m", "nusam.experiments.command", "train", *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def epochs(folder):
    return json.loads((folder / "outcome.json").read_text())["epochs"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert "Test accuracy" in nusam("--out", folder).stdout
    return folder


def test_it_is_the_training_of_the_experiments(undisturbed):
    source = load("digits", undisturbed, 128)
    outcome = train(Run("mixer", "nusam", 0.1, 0), Recipe(4), source, CPU, lambda epoch: None)
    assert [epoch["test_accuracy"] for epoch in epochs(undisturbed)] == [e.test_accuracy for e in outcome.epochs]


def test_tensorboard_finds_both_losses_and_the_singular_values(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/unperturbed", "loss/perturbed", "loss/sharpness_gap", "learning_rate", "active", "rho"} <= tags
    assert any(tag.startswith("sigma/") for tag in tags)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_is_bit_equal(number, tmp_path, undisturbed):
    command = [sys.executable, "-m", "nusam.experiments.command", "train", *SMALL, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate()
    if process.returncode == 0:
        pytest.skip("it had finished before the signal came")
    assert process.returncode == 130
    assert "with --resume goes on" in " ".join(said.split())
    nusam("--out", tmp_path, "--resume")
    assert epochs(tmp_path) == epochs(undisturbed)


def test_another_runs_checkpoint_is_refused(undisturbed):
    refused = nusam("--out", undisturbed, "--resume", "--seed", "7", check=False)
    assert refused.returncode == 2
    assert "is of a run with another run; give the same options, or another --out." in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "resnet"], "--model must be one of mixer, vit,"),
        (["--base", "lion"], "--base must be one of sgd, adam, adamw, adafactor, got lion."),
        (["--epochs", "0"], "--epochs must be at least 1, got 0."),
        (["--data", "cifar100"], "--data cifar100 needs the folder cifar-100-python"),
        (["--model", "vit-s/16"], "could not be loaded"),
        (["--out", "/proc/nowhere"], "can't be written to"),
    ],
)
def test_what_it_refuses(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    refused = nusam(*arguments, *out, check=False)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert sentence in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--parallel", "ddp"], ["--parallel", "fsdp2"], ["--accumulate", "2"]])
def test_two_processes_train_as_one_does(options, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    accumulate = options if "--accumulate" in options else []
    nusam("--out", alone, *accumulate)
    torchrun(2, "nusam.experiments.command", "train", *SMALL, *options, "--out", str(together), module=True)
    for ours, theirs in zip(epochs(together), epochs(alone), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_accelerate_launches_it_too(tmp_path, undisturbed):
    launcher = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--module", "nusam.experiments.command", "train", *SMALL]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for ours, theirs in zip(epochs(tmp_path), epochs(undisturbed), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "fp16"], ["--base", "sgd"]])
def test_other_ways_to_train_learn_too(options, tmp_path):
    nusam("--out", tmp_path, *options)
    losses = [epoch["train_loss"] for epoch in epochs(tmp_path)]
    assert losses[-1] < losses[0]


def test_augmentation_moves_images_and_leaves_the_global_generator_alone():
    from nusam.experiments.augmentation import AUGMENTATIONS, augmented

    pixels = torch.rand(16, 3, 32, 32) * 2 - 1
    for name in AUGMENTATIONS:
        before = torch.get_rng_state()
        first, again = (augmented(pixels, name, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(first, pixels) == (name == "none")
        assert first.shape == pixels.shape
        assert first.min() >= -1
        assert first.max() <= 1
        assert torch.equal(torch.get_rng_state(), before)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from nusam.experiments.checkpoint import Checkpoint
    from nusam.experiments.errors import Refused

    source = load("digits", tmp_path, 64)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", {"run": 1}, resume=False)
    save, saved = torch.save, []

    def fills_up(content, file):
        if saved:
            file.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        save(content, file)
        saved.append(file)

    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(Refused, match=r"could not be written .*What was saved before is still there"):
        train(Run("mixer", "nusam", 0.1, 0), Recipe(3), source, CPU, lambda epoch: None, checkpoint=checkpoint)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["progress"].step == 2
    assert not (tmp_path / "checkpoint.partial").exists()
