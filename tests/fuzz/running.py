"""Runs the machine until enough steps have been taken."""

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import Machine
from tests.fuzz.tally import Tally

TRIALS = 20  # of each seed


def fuzz(steps: int, first: int = 0, shrinks: bool = True) -> int:
    """Take at least so many steps of the library, from a seed on; the number of seeds that it took."""
    end, number = Tally.steps + steps, first
    phases = [Phase.generate, *[Phase.shrink] * shrinks]
    how = settings(
        max_examples=TRIALS,
        stateful_step_count=20,
        deadline=None,
        database=None,
        derandomize=False,  # the seed says all
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    while Tally.steps < end:
        run_state_machine_as_test(seed(number)(type("Machine", (Machine,), {})), settings=how)
        number += 1
    return number - first
