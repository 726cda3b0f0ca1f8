"""``nusam train``: what it leaves, how it stops, and how it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nusam.experiments.errors import Refused
from nusam.experiments.files import alone_in, save_whole
from nusam.experiments.runs.progress import Bars, describe
from nusam.experiments.runs.store import Cell
from nusam.experiments.training.checkpoint import Checkpoint, _generators, _set_generators
from nusam.experiments.training.data import load
from nusam.experiments.training.loop import Stopped, train
from nusam.experiments.training.machine import Machine
from nusam.experiments.training.methods import BASES, kept_as, title
from nusam.experiments.training.scalars import Scalars
from nusam.experiments.training.spec import Epoch, Recipe, Report, Run
from tests.distributed.launching import forked
from tests.experiments.commands import nusam
from tests.experiments.full_disks import files_of_at_most

SMALL = ["--train-size", "128", "--epochs", "4", "--rho", "0.1"]
LONG = ["--epochs", "30"]
CPU = torch.device("cpu")
IDENTITY = {"run": {"seed": 0}}


def trained(*arguments, check=True):
    """What the command says of a run."""
    return nusam("train", *SMALL, *arguments, check=check)


def in_a_process(*arguments):
    """The same, where nothing is left of other tests."""
    command = [sys.executable, "-m", "nusam.experiments.commands.main", "train", *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def refused(*arguments):
    """What the command says on its one line of errors."""
    done = nusam("train", *SMALL, *arguments, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def epochs(folder):
    return json.loads((folder / "outcome.json").read_text())["epochs"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert "Test accuracy" in in_a_process("--out", folder).stdout
    return folder


@pytest.mark.slow
def test_it_is_the_training_of_the_experiments(undisturbed):
    source = load("digits", undisturbed, 128)
    outcome = train(Run("mixer", "nusam", 0.1, 0), Recipe(4), source, CPU, lambda epoch: None)
    assert [epoch["test_accuracy"] for epoch in epochs(undisturbed)] == [e.test_accuracy for e in outcome.epochs]


@pytest.mark.slow
def test_tensorboard_finds_both_losses_and_the_singular_values(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/unperturbed", "loss/perturbed", "loss/sharpness_gap", "learning_rate", "active", "rho"} <= tags
    assert any(tag.startswith("sigma/") for tag in tags)


@pytest.fixture(scope="module")
def undisturbed_and_long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    in_a_process("--out", folder, *LONG)
    return folder


SIGNALLED = """
import os
from nusam.experiments.training.checkpoint import Checkpoint
from nusam.experiments.commands.main import main

save = Checkpoint.save

def save_and_signal(self, state):
    save(self, state)
    if not self.stop_asked:  # at the end of an epoch, with nearly all to come
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

Checkpoint.save = save_and_signal
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_is_bit_equal(number, tmp_path, undisturbed_and_long):
    command = [sys.executable, "-c", SIGNALLED, "train", *SMALL, *LONG, "--out", str(tmp_path)]
    environment = {**os.environ, "SIGNAL": str(int(number))}
    stopped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert "with --resume goes on" in " ".join(stopped.stdout.split())
    assert not (tmp_path / "outcome.json").exists()
    in_a_process("--out", tmp_path, *LONG, "--resume")
    assert epochs(tmp_path) == epochs(undisturbed_and_long)


def test_a_finished_run_is_resumed_to_the_same_outcome(undisturbed, tmp_path):
    shutil.copy(undisturbed / "checkpoint.pt", tmp_path)  # killed after the last checkpoint: there is no outcome yet
    for _ in range(2):
        done = trained("--out", tmp_path, "--resume")
        assert "Test accuracy" in done.stdout
        assert done.stderr == ""
        assert epochs(tmp_path) == epochs(undisturbed)


def interrupted_and_resumed(run, recipe, source, folder, after, machine):
    """A run that is asked to stop after an epoch, and what it comes to when it goes on."""
    first = Checkpoint(folder / "checkpoint.pt", IDENTITY, resume=False)
    reported = []

    def stop(epoch):
        reported.append(epoch)
        first.stop_asked = len(reported) == after

    with pytest.raises(Stopped):
        train(run, recipe, source, CPU, stop, machine(), first)
    torch.manual_seed(99)  # of another process
    again = Checkpoint(folder / "checkpoint.pt", IDENTITY, resume=True)
    told = []
    outcome = train(run, recipe, source, CPU, told.append, machine(), again)
    assert told == outcome.epochs
    assert told[:after] == reported
    return outcome


def float16_with_a_scale_that_moves():
    machine = Machine(CPU, "fp16")
    machine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=3)
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nusam", "none"])
def test_float16_resumes_bit_equal_after_the_scale_has_backed_off(method, tmp_path):
    source = load("digits", tmp_path, 128)
    run, recipe = Run("mixer", kept_as(method), 0.1 if method == "nusam" else 0.0, 0), Recipe(12, batch_size=8)
    machine, scales = float16_with_a_scale_that_moves(), [2.0**9]
    undisturbed = train(run, recipe, source, CPU, lambda epoch: scales.append(machine.scaler.get_scale()), machine)
    assert any(after < before for before, after in pairwise(scales[:7]))
    assert scales[6] not in (2.0**9, scales[-1])  # the scale at the stop is neither the first one nor the last
    resumed = interrupted_and_resumed(run, recipe, source, tmp_path, 6, float16_with_a_scale_that_moves)
    assert resumed.epochs == undisturbed.epochs
    assert resumed.validation_accuracy == undisturbed.validation_accuracy


def test_one_pass_resumes_bit_equal(tmp_path):
    """Though a batch is augmented before the step that it belongs to."""
    source = load("digits", tmp_path, 128)
    run = Run("mixer", "nusam", 0.1, 0, ascent_share=1 / 4, one_pass=True)
    recipe = Recipe(6, augment="crop")
    undisturbed = train(run, recipe, source, CPU, lambda epoch: None)
    resumed = interrupted_and_resumed(run, recipe, source, tmp_path, 3, lambda: Machine(CPU))
    assert resumed.epochs == undisturbed.epochs
    assert resumed.validation_accuracy == undisturbed.validation_accuracy


def test_dropout_resumes_bit_equal(tmp_path):
    pytest.importorskip("transformers")
    source = load("sentences", tmp_path, 64)
    run, recipe = Run("bert-tiny", "nusam", 0.01, 0), Recipe(4)
    undisturbed = train(run, recipe, source, CPU, lambda epoch: None)
    resumed = interrupted_and_resumed(run, recipe, source, tmp_path, 2, lambda: Machine(CPU))
    assert resumed.epochs == undisturbed.epochs


@pytest.mark.slow
def test_dropout_resumes_bit_equal_in_every_process(tmp_path):
    pytest.importorskip("transformers")
    said = forked(2, "tests.experiments.resuming", (str(tmp_path),))
    assert said.count("bit-equal") == 2
    assert said.count("refused") == 2


def test_the_generator_of_the_models_own_device_is_kept(monkeypatch):
    accelerator = SimpleNamespace(states={})
    accelerator.get_rng_state = lambda device: torch.tensor([device.index])
    accelerator.set_rng_state = lambda state, device: accelerator.states.update({device.index: state})
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))
    _set_generators(model, _generators(model))
    assert accelerator.states == {1: torch.tensor([1])}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_the_device_is_resumed():
    model = torch.nn.Linear(2, 2).cuda()
    states = _generators(model)
    drawn = torch.rand(3, device="cuda")
    _set_generators(model, states)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


@pytest.mark.parametrize(
    ("arguments", "different"),
    [
        (["--seed", "7"], "seed 0 and not 7"),
        (["--method", "none"], "method nusam and not adamw, rho 0.1 and not 0.0"),
        (["--learning-rate", "0.1"], "learning rate 0.004 and not 0.1"),
        (["--precision", "bf16"], "precision fp32 and not bf16"),
        (["--compile"], "compile False and not True"),
        (["--parallel", "fsdp2"], "parallel ddp and not fsdp2"),
    ],
)
def test_another_runs_checkpoint_is_refused(arguments, different, undisturbed):
    said = refused("--out", undisturbed, "--resume", *arguments)
    assert f"is of a run with {different}; give the same options, or another --out." in said


@pytest.mark.parametrize("part", ["identity", "model", "optimizer", "schedule", "noise", "random", "progress"])
def test_a_checkpoint_that_lacks_a_part_is_refused(part, undisturbed, tmp_path):
    saved = torch.load(undisturbed / "checkpoint.pt", weights_only=False)
    identity = saved["identity"]
    del saved[part]
    torch.save(saved, tmp_path / "checkpoint.pt")
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", identity, resume=True)
    source = load("digits", tmp_path, 128)
    with pytest.raises(
        Refused, match=rf"is no whole checkpoint \(it lacks '{part}'\); remove it, or leave out --resume"
    ):
        train(Run("mixer", "nusam", 0.1, 0), Recipe(4), source, CPU, lambda epoch: None, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert "is no whole checkpoint" in refused("--out", tmp_path, "--resume")


def test_outcome_says_on_what_it_was_trained(undisturbed):
    outcome = json.loads((undisturbed / "outcome.json").read_text())
    expected = {"precision": "fp32", "compile": False, "parallel": "ddp", "processes": 1}
    device = outcome["machine"].pop("device")
    assert outcome["machine"] == expected
    assert re.fullmatch(r"cpu \(.+\)", device)  # with the processor's model


@pytest.mark.parametrize("command", [["train", *SMALL], ["find-rho", "--rhos", "0.1"]])
def test_two_processes_do_not_fill_one_folder(command, tmp_path):
    pytest.importorskip("fcntl")
    with alone_in(tmp_path):
        done = nusam(*command, "--out", tmp_path, check=False)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"--out {tmp_path} is being filled by another process; wait for it, or name another folder." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "lower"), [("none", "lower the learning rate."), ("sam", "lower the learning rate or rho.")]
)
def test_a_run_that_diverges_says_so(method, lower, tmp_path):
    options = ("--method", method, "--base", "sgd", "--learning-rate", "1e20", "--epochs", "2", "--out", tmp_path)
    done = trained(*options, check=False)
    assert done.returncode == 1
    assert f"The run diverged: its loss is not finite from epoch 1 on; {lower}" in " ".join(done.stdout.split())
    outcome = json.loads((tmp_path / "outcome.json").read_text(), parse_constant=pytest.fail)
    assert outcome["epochs"][-1]["train_loss"] is None
    assert outcome["test_accuracy"] is not None


@pytest.mark.parametrize("options", [[], ["--delay", "0.9"]])
def test_the_delay_of_the_command_is_no_reason_for_a_warning(options, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained("--epochs", "11", "--train-size", "32", *options, "--out", tmp_path)
    assert not [warning for warning in caught if "active" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "resnet"], "--model must be one of mixer, vit,"),
        (["--base", "lion"], "--base must be one of sgd, adam, adamw, adafactor, got lion."),
        (["--epochs", "0"], "epochs must be at least 1, got 0."),
        (["--method", "lion"], "--method must be one of none, adamw, sam, sam-on, nusam,"),
        (["--method", "adamw", "--base", "sgd"], "--method adamw and --base sgd are two base optimizers"),
        (["--data", "cifar100"], "--data cifar100 needs the files of the folder cifar-100-python"),
        (["--model", "vit-s/16"], "could not be loaded"),
        (["--out", "/proc/nowhere"], "can't be written to"),
    ],
)
def test_what_it_refuses(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert sentence in refused(*arguments, *out)


TOGETHER = [("--parallel", "ddp"), ("--parallel", "fsdp2"), ("--accumulate", "2")]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes have trained, which are started once for all ways."""
    folder = tmp_path_factory.mktemp("together")
    lines = (("train", *SMALL, *options, "--out", str(folder / options[1])) for options in TOGETHER)
    forked(2, "tests.experiments.together", *lines)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", TOGETHER)
def test_two_processes_train_as_one_does(options, tmp_path, undisturbed, together):
    alone = undisturbed
    if "--accumulate" in options:
        alone = tmp_path
        trained("--out", alone, *options)
    for ours, theirs in zip(epochs(together / options[1]), epochs(alone), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_accelerate_launches_it_too(tmp_path, undisturbed):
    launcher = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--module", "nusam.experiments.commands.main", "train", *SMALL]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for ours, theirs in zip(epochs(tmp_path), epochs(undisturbed), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "fp16"], ["--base", "sgd"]])
def test_other_ways_to_train_learn_too(options, tmp_path):
    trained("--out", tmp_path, *options)
    losses = [epoch["train_loss"] for epoch in epochs(tmp_path)]
    assert losses[-1] < losses[0]


def test_augmentation_moves_images_and_leaves_the_global_generator_alone():
    from nusam.experiments.training.augmentation import AUGMENTATIONS, augmented

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


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path):
    source = load("digits", tmp_path, 64)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", IDENTITY, resume=False)
    with ExitStack() as disk:

        def fills_up(epoch):
            if checkpoint.path.exists():
                disk.enter_context(files_of_at_most(100_000))

        with pytest.raises(Refused, match=r"could not be written \(File too large\); make room .*is still there\)\.$"):
            train(Run("mixer", "nusam", 0.1, 0), Recipe(3), source, CPU, fills_up, checkpoint=checkpoint)
    assert torch.load(checkpoint.path, weights_only=False)["progress"]["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_weights_that_find_no_room_leave_nothing(tmp_path):
    source = load("digits", tmp_path, 64)
    run, keep = Run("mixer", "adamw", 0.0, 0), tmp_path / "weights" / "key.pt"
    with (
        files_of_at_most(100_000),
        pytest.raises(Refused, match=r"key.pt could not be written \(File too large\); make"),
    ):
        train(run, Recipe(1), source, CPU, lambda epoch: None, keep=keep)
    assert list(keep.parent.iterdir()) == []


def test_an_error_of_torch_that_is_no_full_disk_stays_what_it_is(tmp_path, monkeypatch):
    def fails(content, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="something else"):
        save_whole(tmp_path / "x.pt", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "left"),
    [(0, r"events\S+\n"), (300, r"events\S+\n"), (1000, r"checkpoint.pt\nevents\S+\n")],
    ids=["no room for the events", "nor for a checkpoint", "nor for a second beside the first"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_unfinished(kilobytes, left, tmp_path):
    own_disk = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={kilobytes + 4}k tmpfs "$0" && echo > "$0/another file"'  # a page of 4 kB
    if subprocess.run([*own_disk, mount, str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this system lets its users mount nothing")
    command = [sys.executable, "-m", "nusam.experiments.commands.main", "train", *SMALL, "--out", str(tmp_path)]
    script = f'{mount} && "$@"; code=$?; ls "$0"; exit $code'
    done = subprocess.run([*own_disk, script, str(tmp_path), *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"nusam: .*\(No space left on device\); make room there, or name .*\.\n", done.stderr)
    assert re.search(rf"another file\n{left}\Z", done.stdout), done.stdout


def test_an_outcome_that_can_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "outcome.json.partial").mkdir()
    said = refused("--out", tmp_path)
    assert re.fullmatch(r"nusam: --out .* can't be written to \(.*\); make room there, or name .*\n", said)


def test_scalars_say_that_the_disk_is_full_where_they_are_written(tmp_path):
    """A thread of their own would print a traceback."""
    threads = threading.active_count()
    scalars = Scalars(tmp_path, every=1)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        for step in range(100):
            scalars.step(step, optimizer, {"unperturbed": torch.ones(())})
    scalars.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        *(("rho", value, "finite and at least 0") for value in ("inf", "nan", "-1")),
        *(("learning-rate", value, "finite and at least 0") for value in ("nan", "inf", "-1")),
        *(("weight-decay", value, "finite and at least 0") for value in ("nan", "-1")),
        *(("delay", value, "at least 0 and below 1") for value in ("-1", "nan", "1", "2")),
        *(("warm-up", value, "at least 0 and below 1") for value in ("-1", "nan", "1", "2")),
        *(("seed", value, "") for value in ("-1", str(2**64))),
        ("train-size", "-5", "at least 0"),
        *((option, "0", "at least 1") for option in ("epochs", "batch-size", "accumulate", "power-iterations")),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(option, value, allowed, tmp_path):
    said = refused(f"--{option}", value, "--out", tmp_path)
    assert re.fullmatch(rf"nusam: {option.replace('-', ' ')} .*must be .*{allowed}.*, got {value}(\.0)?\.\n", said)
    assert list(tmp_path.iterdir()) == []


def test_stored_runs_are_read_back_and_keep_their_keys():
    committed = Path(__file__).parents[2] / "docs" / "results" / "runs.jsonl"
    for line in committed.read_text().splitlines():
        row = json.loads(line)
        cell = dict(row["cell"], run=Run(**row["cell"]["run"]), recipe=Recipe(**row["cell"]["recipe"]))
        assert Cell(**cell).key == row["key"]


def test_none_is_the_base_optimizer_alone(tmp_path):
    source = load("digits", tmp_path, 128)
    said = trained("--out", tmp_path, "--method", "none", "--base", "sgd", "--delay", "0.5").stdout
    recipe = Recipe(4, base="sgd")
    outcome = train(Run("mixer", "adamw", 0.0, 0), recipe, source, CPU, lambda epoch: None)
    assert [epoch["test_accuracy"] for epoch in epochs(tmp_path)] == [e.test_accuracy for e in outcome.epochs]
    kept = json.loads((tmp_path / "outcome.json").read_text())["run"]
    assert kept == asdict(outcome.run)  # under the name that finished runs have in stores
    assert "AdamW" not in said


def test_the_base_optimizer_alone_is_called_by_its_name():
    alone, perturbed = Run("mixer", "adamw", 0.0, 3), Run("mixer", "sam", 0.1, 3)
    assert describe(alone, "sgd") == "Mixer SGD, seed 3"
    assert describe(alone) == "Mixer AdamW, seed 3"
    assert describe(perturbed, "sgd") == "Mixer SAM ρ=0.1, seed 3"
    assert {title("adamw", base) for base in BASES} == {"SGD", "Adam", "AdamW", "Adafactor"}
    bars = Bars(Console(quiet=True), 1, 2, "sgd")
    bars.show(Report(0, alone, Epoch(1.0, 0.5)))
    assert bars.tasks[-1].description == "Mixer SGD, seed 3"
