"""Random training loops: after every step weights, ε, warm starts, buffers and state are those of a loop by hand."""

import pytest

from tests.fuzz.running import fuzz
from tests.fuzz.trial import Tally


@pytest.mark.parametrize(
    ("steps", "first"),
    [(1_000, 0), *(pytest.param(2_500, first, marks=pytest.mark.slow) for first in (1_000, 2_000, 3_000, 4_000))],
)
def test_random_loops_equal_the_loop_by_hand(steps, first):
    before = Tally.steps
    fuzz(steps, first)
    assert Tally.steps - before >= steps
