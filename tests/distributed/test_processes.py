"""Every check of :mod:`tests.distributed.checks`, in as many real processes as it asks for."""

from functools import cache

import pytest

from tests.distributed.checks import CHECKS
from tests.distributed.matrix import uncovered
from tests.distributed.running import answers_of
from tests.distributed.support import DOCUMENTS, table, written

answers = cache(answers_of)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("processes", "name"),
    [(n, name) for n in CHECKS for name in CHECKS[n]],
)
def test_in_processes(processes, name):
    answer = answers(processes, "checks")["checks"][name]
    assert "error" not in answer, answer.get("trace")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_support_matrix_is_what_the_methods_do(document):
    assert written(document) == table([answers(n, "checks")["checks"]["support"]["value"] for n in (2, 4)])


@pytest.mark.parametrize("processes", CHECKS)
def test_every_two_choices_meet_in_some_cell(processes):
    assert uncovered(processes) == []
