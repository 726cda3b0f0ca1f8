"""The package's names are there whichever comes first, and cost nothing before they are asked for."""

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import nusam


def in_a_new_process(program):
    """What the program printed."""
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_no_torch():
    assert in_a_new_process("import sys, nusam; print('torch' in sys.modules, nusam.__version__)") == (
        f"False {nusam.__version__}"
    )


def test_a_star_brings_every_name():
    program = "import nusam\nfrom nusam import *\nprint(all(name in globals() for name in nusam.__all__))"
    assert in_a_new_process(program) == "True"


def test_names_are_listed_before_they_are_used():
    program = "import nusam; print(set(nusam.__all__) <= set(dir(nusam)), hasattr(nusam, 'NuSam'))"
    assert in_a_new_process(program) == "True False"


def test_a_type_checker_is_told_of_the_same_names():
    """It reads the imports, which never run."""
    tree = ast.parse(Path(nusam.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name for node in block.body for alias in node.names}
    assert told | {"__version__"} == set(nusam.__all__)


@pytest.mark.parametrize("name", [name for name in nusam.__all__ if name not in ("__version__", "lmo", "memory")])
def test_a_name_is_pickled_as_what_it_is(name):
    thing = getattr(nusam, name)
    assert pickle.loads(pickle.dumps(thing)) is thing
    assert copy.deepcopy(thing) is thing


def test_what_is_set_stays(monkeypatch):
    """As in tests that replace a function for a while."""
    before = nusam.sharpness
    with monkeypatch.context() as patched:
        patched.setattr(nusam, "sharpness", len)
        assert nusam.sharpness is len
    assert nusam.sharpness is before
