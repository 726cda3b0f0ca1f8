"""Each framework's example trains on real images, by the options that it documents, and its loss goes down."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {
    "train_lightning.py": ["", "--precision bf16-mixed --accumulate 2 --clip 1.0"],
    "train_fabric.py": ["", "--precision bf16-mixed --accumulate 2"],
    "train_transformers.py": ["", "--bf16 --accumulate 2"],
    "train_accelerate.py": ["", "--precision bf16 --accumulate 2"],
}


def epochs(example, options):
    """A processor takes its time for bfloat16."""
    return 3 if "bf16" in options and example != "train_transformers.py" else 4


def run(example, options, folder, monkeypatch, capsys):
    """The losses of its epochs, and the accuracy that it ended with in %."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--folder", str(folder), "--epochs", str(epochs(example, options)), *shlex.split(options)]
    monkeypatch.setattr(sys, "argv", [example, *words])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"epoch \d+: loss ([\d.]+)", said)]
    return losses, float(re.findall(r"test accuracy ([\d.]+)%", said)[-1])


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*num_workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # accelerate asks for it on a CPU too
@pytest.mark.parametrize(
    ("example", "options"),
    [  # a processor takes its time for bfloat16, and Trainer for its imports
        pytest.param(name, options, marks=[pytest.mark.slow] if "bf16" in options or "transformers" in name else [])
        for name, many in RUNS.items()
        for options in many
    ],
)
def test_the_loss_goes_down(example, options, tmp_path, monkeypatch, capsys):
    losses, accuracy = run(example, options, tmp_path, monkeypatch, capsys)
    assert len(losses) == epochs(example, options)
    assert losses[-1] < 0.9 * losses[0]
    assert accuracy > 30  # of ten digits


def test_every_example_of_these_frameworks_is_run():
    users = re.compile(
        r"^from nusam\.integrations\.(lightning|transformers|accelerate)|^from lightning_fabric", re.MULTILINE
    )
    assert {path.name for path in EXAMPLES.glob("*.py") if users.search(path.read_text())} == RUNS.keys()
