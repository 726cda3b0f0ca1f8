"""Training loops of the wild, each in every way and precision, held to a loop by hand."""

import re

import pytest
import torch

from tests.loops.loop import Loop
from tests.loops.page import cell, committed, run, summary
from tests.loops.running import MODES, TOLERANCE, by_hand, iterations


def named(case):
    return re.sub(r"(?<!^)(?=[A-Z])", "-", case.__name__).lower()


LOOPS = [pytest.param(case, id=named(case), marks=[pytest.mark.slow] * case.slow) for case in Loop.known]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_is_right_or_refused(case, mode):
    outcomes = {dtype: run(case, mode, dtype) for dtype in case.dtypes}
    wrong = {dtype: result.said for dtype, result in outcomes.items() if result.verdict == "WRONG"}
    published = committed()[1][case.__doc__, mode]  # else: python -m tests.loops.page
    if "WRONG" in published:  # a fault that is known, and said on the page until it is mended
        assert wrong
        pytest.xfail("wrong, as the page says")
    assert not wrong
    assert published == cell(outcomes)


@pytest.mark.parametrize("case", LOOPS)
def test_a_missing_perturbation_would_be_noticed(case):
    steps, ratio, _ = by_hand(case)
    assert iterations(ratio, torch.float64) <= 150  # a small gap would make a power iteration look wrong
    everything = frozenset((k, name) for k, step in enumerate(steps) for name in step.epsilon)
    assert everything
    without = by_hand(case, everything)[0][-1].tensors
    difference = max(
        float((value.double() - without[name].double()).abs().max()) for name, value in steps[-1].tensors.items()
    )
    assert difference > 30 * TOLERANCE[torch.float32]


def test_the_page_lists_these_loops_and_no_others():
    line, cells = committed()
    assert {loop for loop, _ in cells} == {case.__doc__ for case in Loop.known}
    assert len({case.__doc__ for case in Loop.known}) == len(Loop.known)
    assert line == summary(cells)


@pytest.mark.parametrize("case", [case for case in LOOPS if case.values[0].frozen])
def test_a_frozen_loop_is_right_with_its_perturbation_in_the_weights(case, monkeypatch):
    monkeypatch.setitem(MODES, "weights", {"placement": "weights"})  # as a refusal of the default advises
    for dtype in case.dtypes:
        if dtype != torch.bfloat16:  # in which much of ε is rounded away
            outcome = run(case, "weights", dtype)
            assert outcome.verdict == "right", outcome.said
