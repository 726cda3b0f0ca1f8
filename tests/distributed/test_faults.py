"""A process is killed in the middle of a pass, or of saving: the examples go on as if nothing had happened."""

import re
import runpy
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.distributed.launching import python, torchrun

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES, FAULTS = ("train_ddp.py", "train_fsdp2.py"), ("ascent", "descent", "saving")
EPOCHS = 3


def arguments(example, fault, folder):
    words = [str(FOLDER / example), fault, str(folder / "archive")]
    return [*words, "--folder", str(folder / "run"), "--epochs", str(EPOCHS), "--resume"]


def outcome(said, folder):
    """The last loss of every epoch, and every checkpoint, of a run that said so."""
    losses = {int(epoch): loss for epoch, loss in re.findall(r"epoch (\d+): loss (\S+),", said)}
    return losses, {path.name: weights(path) for path in sorted((folder / "archive").iterdir())}


def weights(checkpoint):
    """The model's weights in a checkpoint of either kind."""
    if checkpoint.is_dir():
        together = checkpoint.with_suffix(".pt")
        dcp_to_torch_save(checkpoint, together)
        saved = torch.load(together)
        together.unlink()
        return saved["model"]
    return torch.load(checkpoint)["model"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What each example does if nobody kills it, as a user starts it."""
    found = {}
    for example in EXAMPLES:
        folder = tmp_path_factory.mktemp("undisturbed")
        said = torchrun(2, str(Path(__file__).with_name("faulty.py")), *arguments(example, "nowhere", folder))
        found[example] = outcome(said, folder)
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What it does if a process dies, in a launcher that starts once for all."""
    folders = {case: tmp_path_factory.mktemp("killed") for case in product(EXAMPLES, FAULTS)}
    words = [word for case, folder in folders.items() for word in ("--", *arguments(*case, folder))][1:]
    said = python("tests.distributed.faulty", *words).split("run of ")
    heard = dict(part.split("\n", 1) for part in said if part)
    return {case: outcome(heard[str(folder / "archive")], folder) for case, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_killed_process_changes_nothing(example, fault, undisturbed, killed):
    losses, checkpoints = killed[example, fault]
    expected_losses, expected = undisturbed[example]
    assert len(expected_losses) == EPOCHS
    assert float(expected_losses[EPOCHS - 1]) < 0.6 * float(expected_losses[0])  # three short epochs
    assert losses == expected_losses
    assert checkpoints.keys() == expected.keys()
    for epoch, saved in checkpoints.items():  # a perturbed weight on disk would differ
        for name, value in saved.items():
            assert torch.equal(value, expected[epoch][name]), (epoch, name)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_explains_itself(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(FOLDER / example), run_name="__main__")
    assert "torchrun" in capsys.readouterr().out
