"""An interrupt at any bytecode of the care for the model leaves its state as one forward leaves it, or as it was."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from nusam.guards.model_guard import ModelGuard
from tests.guards.stateful import AbsentAtFirst, AssignedStatistics, Fading, GrowingMemory, Momentum, Queue
from tests.guards.test_buffers import LARGE, loss_of, state_of
from tests.interrupting import bytecodes, interrupted, moments


def model():
    torch.manual_seed(3)
    kinds = (AssignedStatistics(8), AbsentAtFirst(8), GrowingMemory(8, "data"), Fading(8, LARGE + 1), Queue(8))
    return nn.Sequential(
        nn.Linear(6, 8), *kinds, Momentum(8, "in place"), Momentum(8, "through .data"), nn.Linear(8, 4)
    ).double()


def equal(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_an_interrupt_anywhere(everything):
    trained = model()
    guard = ModelGuard(trained)
    reached = []

    def step(everything):
        guard.before_ascent(everything)
        loss_of(trained, 0)
        guard.after_ascent()
        reached.append("ascent")
        with guard.descent(True):
            reached.append("descent")
            loss_of(trained, 0)

    step(True)
    executed = bytecodes(lambda: step(everything))
    assert len(executed) > 1000
    for moment in moments(Counter(executed), phase=8 * everything):
        before = state_of(trained)
        once = copy.deepcopy(trained)
        loss_of(once, 0)
        reached.clear()
        interrupted(lambda: step(everything), *moment)
        wanted = state_of(once)
        assert torch.is_grad_enabled()
        assert equal(state_of(trained), wanted) or (not reached and equal(state_of(trained), before)), moment
        trained.state_dict()
        copy.deepcopy(trained)
