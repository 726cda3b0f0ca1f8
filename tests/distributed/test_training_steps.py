"""Training steps of the wild, uneven batches, hooks and wrappers, in two real processes."""

from functools import cache

import pytest

from tests.distributed.running import answers_of, checks_of

KINDS = ("loops", "unreached", "uneven", "hooks", "wrapped", "state", "shares", "riding", "family", "convolving", "own")
NAMES = [(size, module, name) for size in (2, 4) for module, name, _ in checks_of(KINDS, size)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
answers = cache(answers_of)


@pytest.mark.parametrize(("size", "module", "name"), NAMES)
def test_in_processes(size, module, name):
    answer = answers(size, *KINDS)[module][name]
    assert "error" not in answer, answer.get("trace")
