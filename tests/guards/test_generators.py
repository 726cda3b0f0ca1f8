"""Both passes draw the same random numbers, from whichever global generator, and a step draws as one pass does."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import nusam

OWN = torch.Generator()
DRAWS = {
    "torch": lambda n: torch.rand(n),
    "python": lambda n: torch.tensor([random.random() for _ in range(n)]),
    "numpy": lambda n: torch.from_numpy(np.random.rand(n)).float(),
    "numpy, normal": lambda n: torch.from_numpy(np.random.randn(n)).float(),  # keeps a number back
    "a module's own": lambda n: torch.rand(n, generator=OWN),
    "python, normal": lambda n: torch.tensor([random.gauss(0, 1) for _ in range(n)]),
}


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.draw = draw
        self.generator = OWN
        self.drawn = []

    def forward(self, x):
        self.drawn.append(self.draw(3))
        return self.linear(x) * self.drawn[-1]


def seed(value):
    torch.manual_seed(value)
    OWN.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def steps(model, opt, number=3):
    for _ in range(number):
        for _ in opt.passes():
            model(torch.ones(4, 6)).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("options", [{}, {"ascent": "matrix-free"}, {"placement": "forward"}])
@pytest.mark.parametrize("draw", DRAWS)
def test_both_passes_draw_alike_and_a_step_draws_as_one_pass(draw, options):
    model = Noisy(DRAWS[draw])
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)
    seed(5)
    steps(model, opt)
    after = DRAWS[draw](3)
    ascents, descents = model.drawn[::2], model.drawn[1::2]
    assert all(torch.equal(a, b) for a, b in zip(ascents, descents, strict=True))
    seed(5)
    once = [DRAWS[draw](3) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip([*ascents, after], once, strict=True))


@pytest.mark.parametrize("draw", DRAWS)
def test_no_generator_is_set_back_without_the_model_or_while_inactive(draw):
    for options in ({"model": None}, {"delay": 10}):
        model = Noisy(DRAWS[draw])
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), **{"model": model, **options})
        seed(5)
        steps(model, opt)
        drawn = len(model.drawn)
        seed(5)
        once = [DRAWS[draw](3) for _ in range(drawn)]
        assert all(torch.equal(a, b) for a, b in zip(model.drawn, once, strict=True))


@pytest.mark.parametrize("draw", DRAWS)
def test_no_draw_is_made_by_the_library(draw):
    model = Noisy(lambda n: torch.ones(n))
    seed(5)
    steps(model, nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model))
    after = DRAWS[draw](3)
    seed(5)
    assert torch.equal(after, DRAWS[draw](3))
