"""What the newcomer's walk reads out of the page."""

import re

import pytest

from .walk import PAGE, ROOT, applied, blocks

BLOCKS = list(blocks(PAGE.read_text("utf-8")))


def test_the_path_is_complete():
    """Demo, own loop before and after, Trainer, FSDP2, each with a command to copy."""
    commands = "\n".join(text for kind, _, text in BLOCKS if kind == "bash")
    stations = ["pip install", "nusam demo", "python train.py", "examples/train_transformers.py", "torchrun"]
    positions = [commands.index(station) for station in stations]
    assert positions == sorted(positions)
    assert commands.count("python train.py") == 2
    assert {kind for kind, _, _ in BLOCKS} == {"bash", "python", "diff"}


def test_the_diffs_apply_and_change_four_lines():
    (program,) = (text for kind, _, text in BLOCKS if kind == "python")
    diffs = [text for kind, _, text in BLOCKS if kind == "diff"]
    changed = program
    for diff in diffs:
        changed = applied(diff, changed)
    compile(changed, "train.py", "exec")
    assert len(set(changed.splitlines()) - set(program.splitlines())) == 4
    assert sum(line.startswith("+") for line in "".join(diffs).splitlines()) == 4


def test_the_loop_is_changed_as_the_readme_says():
    (readme,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert readme in [text for kind, _, text in BLOCKS if kind == "diff"]


def test_a_diff_that_fits_nowhere_or_twice_is_an_error():
    with pytest.raises(ValueError, match="0 times"):
        applied("-a\n+b\n", "c\n")
    with pytest.raises(ValueError, match="2 times"):
        applied("-a\n+b\n", "a\na\n")
    assert applied("-a\n+b\n x\n", "a\nx\na\n") == "b\nx\na\n"
