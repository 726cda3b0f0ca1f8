"""Training steps of the wild, uneven batches, hooks and wrappers, in two real processes."""

import json
from importlib import import_module

import pytest

from tests.distributed.launching import torchrun

KINDS = ("loops", "unreached", "uneven", "hooks", "wrapped", "state", "shares", "riding", "family", "convolving")
MODULES = {name: import_module(f"tests.distributed.{name}") for name in KINDS}
NAMES = [
    (module, size, name) for module in MODULES for size, checks in MODULES[module].CHECKS.items() for name in checks
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the checks of a module said, whose processes are started once."""
    known = {}

    def ask(module, size):
        if (module, size) not in known:
            said = tmp_path_factory.mktemp("answers") / f"{module}.json"
            torchrun(size, "tests.distributed.running", str(said), module, module=True)
            known[module, size] = json.loads(said.read_text())
        return known[module, size]

    return ask


@pytest.mark.parametrize(("module", "size", "name"), NAMES)
def test_in_processes(module, size, name, answers):
    answer = answers(module, size)[name]
    assert "error" not in answer, answer.get("trace")
