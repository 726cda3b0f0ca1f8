"""Every check of :mod:`tests.distributed.checks`, in as many real processes as it asks for."""

import json

import pytest

from tests.distributed.checks import CHECKS
from tests.distributed.launching import torchrun
from tests.distributed.support import DOCUMENTS, table, written


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the checks said in a number of processes, which are started once."""
    known = {}

    def ask(processes, *words):
        if (processes, words) not in known:
            said = tmp_path_factory.mktemp("answers") / f"{processes}.json"
            torchrun(processes, "tests.distributed.running", str(said), "checks", *words, module=True)
            known[processes, words] = json.loads(said.read_text())
        return known[processes, words]

    return ask


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("processes", "name"),
    [(n, name) for n in CHECKS for name in CHECKS[n]],
)
def test_in_processes(processes, name, answers):
    answer = answers(processes)[name]
    assert "error" not in answer, answer.get("trace")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_support_matrix_is_what_the_methods_do(document, answers):
    assert written(document) == table([answers(2, "support")["support"]["value"], answers(4)["support"]["value"]])
