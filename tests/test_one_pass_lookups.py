"""One pass: a table is looked up by a vector of indices, of which each sample has its own, or all have the same."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.test_one_pass import assert_same, bases, built, by_hand, run, two_passes, wrapped


class Placed(nn.Module):
    """Positions, the same for all samples, and a label for each of them."""

    def __init__(self):
        super().__init__()
        self.table, self.places, self.labels = nn.Embedding(9, 6), nn.Embedding(20, 6), nn.Embedding(9, 6)
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 9)
        self.is_placed = lambda: True

    def forward(self, tokens):
        x = self.table(tokens) + self.labels(tokens[:, 0])[:, None]
        if self.is_placed():
            x = x + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.up(x)))


def mean(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batches_of(shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, shape, generator=generator) for shape in shapes]


def by_hand_on(batches, share=1 / 4, carries=None, kind=Placed):
    model = built(kind)
    by_hand(model, bases()["SGD"](model), batches, mean, share, carries=carries)
    return model


@pytest.mark.parametrize(("share", "last"), [(1 / 4, 8), (1 / 4, 4), (1, 8), (1, 2)])
@pytest.mark.parametrize("length", [5, 9, 10, 16])
@pytest.mark.filterwarnings("error")
def test_positions_of_any_length_beside_any_number_of_samples(length, share, last):
    """8 samples travel with 2 of the next batch, or with 1 of a smaller last one; or with 8 and 2."""
    model, batches = built(Placed), batches_of([(8, length)] * 5 + [(last, length)])
    run(wrapped(model, share=share), model, batches, mean)
    assert_same(model, by_hand_on(batches, share), 1e-7)


@pytest.mark.parametrize("lengths", [(5, 10), (10, 5), (9, 20)])
def test_a_length_that_becomes_a_multiple_of_the_samples(lengths):
    model, batches = built(Placed), batches_of([(8, n) for n in (lengths[0],) * 5 + (lengths[1],) * 4])
    with pytest.warns(UserWarning, match="change from batch to batch"):
        run(wrapped(model), model, batches, mean)
    assert_same(model, by_hand_on(batches, carries=[number != 4 for number in range(8)] + [False]), 1e-7)


@pytest.mark.parametrize("length", [5, 10])
def test_a_table_that_is_first_looked_up_in_the_middle_of_a_run(length):
    """What a multiple of the samples means is then found out in the next step."""
    step = 0
    model, batches = built(Placed), batches_of([(8, length)] * 9)
    model.is_placed = lambda: step > 4
    opt, waits = wrapped(model, power_iterations=1), []
    seen_late = pytest.warns(UserWarning, match="looks up a table that it had not looked up before; such a step")
    unperturbed = pytest.warns(UserWarning, match="places.weight got a gradient in the descent and none in the ascent")
    with unperturbed, seen_late if length == 10 else contextlib.nullcontext():
        for _ in opt.one_pass(batches, lambda tokens: mean(model, tokens)):
            waits.append(opt._waiting is not None)
            opt.step()
            step += 1
    assert not opt._refused
    without = [0, 8] if length == 5 else [0, 6, 8]  # where it has its first ε
    assert waits == [number not in without for number in range(9)]


class Both(Placed):
    """One table, for a label of each sample and for positions."""

    def forward(self, tokens):
        x = self.table(tokens) + self.places(tokens[:, 0])[:, None] + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.up(x)))


@pytest.mark.parametrize("length", [5, 9, 10, 20])
def test_a_table_that_is_looked_up_in_both_ways_takes_two_passes(length):
    model, expected, batches = built(Both), built(Both), batches_of([(8, length)] * 6)
    with pytest.warns(UserWarning, match="looks up a table now for each sample and now for all of them") as told:
        run(wrapped(model), model, batches, mean)
    assert len(told) == 1
    two_passes(wrapped(expected), expected, batches, mean)
    assert_same(model, expected)
