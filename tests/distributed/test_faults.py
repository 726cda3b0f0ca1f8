"""A process is killed in the middle of a pass, or of saving: the examples go on as if nothing had happened."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.distributed.launching import python, torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS = 3


def run(example, fault, folder):
    """The last loss of every epoch, and every checkpoint, of a run that dies where told."""
    arguments = [str(EXAMPLES / example), fault, str(folder / "archive")]
    arguments += ["--folder", str(folder / "run"), "--epochs", str(EPOCHS), "--resume"]
    if fault == "nowhere":
        said = torchrun(2, str(Path(__file__).with_name("faulty.py")), *arguments)
    else:
        said = python("tests.distributed.faulty", *arguments)
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
    """What each example does if nobody kills it."""
    return {
        example: run(example, "nowhere", tmp_path_factory.mktemp("undisturbed"))
        for example in ("train_ddp.py", "train_fsdp2.py")
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ascent", "descent", "saving"])
@pytest.mark.parametrize("example", ["train_ddp.py", "train_fsdp2.py"])
def test_a_killed_process_changes_nothing(example, fault, tmp_path, undisturbed):
    losses, checkpoints = run(example, fault, tmp_path)
    expected_losses, expected = undisturbed[example]
    assert len(expected_losses) == EPOCHS
    assert float(expected_losses[EPOCHS - 1]) < 0.6 * float(expected_losses[0])  # three short epochs
    assert losses == expected_losses
    assert checkpoints.keys() == expected.keys()
    for epoch, saved in checkpoints.items():  # a perturbed weight on disk would differ
        for name, value in saved.items():
            assert torch.equal(value, expected[epoch][name]), (epoch, name)


@pytest.mark.slow
def test_an_example_explains_itself():
    for example in ("train_ddp.py", "train_fsdp2.py"):
        said = subprocess.run(
            [sys.executable, EXAMPLES / example, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert "torchrun" in said
