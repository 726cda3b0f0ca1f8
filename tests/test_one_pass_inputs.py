"""One pass: what layers are given is either rows of samples, or the same for all of them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nusam.one_pass import copies
from tests.test_one_pass import assert_same, bases, built, by_hand, run, wrapped


class Placed(nn.Module):
    """Positions, the same for all samples, and a label for each of them."""

    def __init__(self):
        super().__init__()
        self.table, self.places, self.labels = nn.Embedding(9, 6), nn.Embedding(20, 6), nn.Embedding(9, 6)
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 9)
        self.is_vector = lambda: True

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        x = self.table(tokens) + self.labels(tokens[:, 0])[:, None]
        x = x + self.places(places if self.is_vector() else places[None])
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
    model, batches = built(Placed), batches_of([(8, length)] * 3 + [(last, length)])
    run(wrapped(model, share=share), model, batches, mean)
    assert_same(model, by_hand_on(batches, share), 1e-7)


@pytest.mark.parametrize("lengths", [(5, 10), (10, 5), (9, 20)])
def test_a_length_that_becomes_a_multiple_of_the_samples(lengths):
    model, batches = built(Placed), batches_of([(8, n) for n in (lengths[0],) * 5 + (lengths[1],) * 4])
    with pytest.warns(UserWarning, match="change from batch to batch"):
        run(wrapped(model), model, batches, mean)
    assert_same(model, by_hand_on(batches, carries=[number != 4 for number in range(8)] + [False]), 1e-7)


@pytest.mark.parametrize("late", range(2, 7))
@pytest.mark.parametrize("length", [5, 10])
def test_a_table_that_is_looked_up_by_a_vector_from_the_middle_of_a_run_on(length, late):
    """If that may mean two things, the step carries nothing, and the next one finds out."""
    step, without = 0, []
    model, batches = built(Placed), batches_of([(8, length)] * 11)
    model.is_vector = lambda: step >= late
    opt = wrapped(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in opt.one_pass(batches, lambda tokens: mean(model, tokens)):
            without += [] if opt._waiting else [step]
            opt.step()
            step += 1
    assert not opt._refused
    is_looked_at = late in (2, 4) or length == 5
    assert without == ([0, 10] if is_looked_at else [0, late, 10])
    assert len(told) == (not is_looked_at)
    assert all("looks up a table that it had not looked up before; such a step" in str(one.message) for one in told)
    assert_same(model, by_hand_on(batches, carries=[number not in without for number in range(11)]), 1e-7)


class Both(Placed):
    """One table, for a label of each sample and for positions."""

    def forward(self, tokens):
        x = self.table(tokens) + self.places(tokens[:, 0])[:, None] + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.up(x)))


@pytest.mark.parametrize("length", [5, 9, 10, 20])
@pytest.mark.filterwarnings("error")
def test_a_table_that_is_looked_up_in_both_ways(length):
    model, batches = built(Both), batches_of([(8, length)] * 4)
    run(wrapped(model), model, batches, mean)
    assert_same(model, by_hand_on(batches, kind=Both), 1e-7)


# ------------------------------------------------------------------------------- what all samples share


class Shared(nn.Module):
    """Makes something in its forward that is the same for all samples."""

    def __init__(self, how):
        super().__init__()
        self.table, self.places, self.turn = nn.Embedding(9, 6), nn.Embedding(20, 6), nn.Linear(6, 6)
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 9)
        self.token, self.how = nn.Parameter(torch.linspace(0, 1, 6)), how

    def forward(self, tokens):
        count, length = tokens.shape
        return self.head(torch.tanh(self.up(self.how(self, self.table(tokens), torch.arange(length), count))))


def between(model, x, places, count):
    """Along a dimension between those of samples and positions, as frames or channels have one."""
    return (x[:, None].expand(-1, 3, -1, -1) + model.places(places)).mean(1)


def distances(model, x, places, count):
    """A number for each pair of positions, as attention adds it."""
    scores = model.places((places[:, None] - places[None]) % 20)
    return x + torch.einsum("qkd,bkd->bqd", scores, x)


SHARED = {
    "[None]": lambda model, x, places, count: x + model.places(places)[None],
    "unsqueezed": lambda model, x, places, count: x + model.places(places).unsqueeze(0),
    "repeated": lambda model, x, places, count: x + model.places(places).unsqueeze(0).repeat(count, 1, 1),
    "expanded": lambda model, x, places, count: x + model.places(places)[None].expand(count, -1, -1),
    "sliced from a table of all": lambda model, x, places, count: x + model.places(torch.arange(20))[: x.shape[1]],
    "one index": lambda model, x, places, count: x + model.places(places[2]),
    "one vector": lambda model, x, places, count: x + model.turn(model.token),
    "a matrix": lambda model, x, places, count: x + model.turn((places[:, None] / 9 + model.token).tanh()),
    "behind another layer": lambda model, x, places, count: x + model.turn(model.places(places))[None],
    "a dimension between": between,
    "distances": distances,
}


@pytest.mark.parametrize("largest", [copies.LARGEST, 0])
@pytest.mark.parametrize(("length", "share"), [(5, 1 / 4), (10, 1 / 4), (10, 1)])
@pytest.mark.parametrize("how", SHARED)
@pytest.mark.filterwarnings("error")
def test_what_all_samples_share_is_served_however_it_is_added(how, length, share, largest, monkeypatch):
    monkeypatch.setattr(copies, "LARGEST", largest)
    model, expected = built(lambda: Shared(SHARED[how])), built(lambda: Shared(SHARED[how]))
    batches = batches_of([(8, length)] * 4 + [(6, length)])
    run(wrapped(model, share=share), model, batches, mean)
    by_hand(expected, bases()["SGD"](expected), batches, mean, share)
    assert_same(model, expected, 1e-7)


def test_what_all_samples_share_takes_two_passes_where_it_is_computed_again():
    def checkpointed(model, x, places, count):
        return x + checkpoint(lambda: model.turn(model.places(places))[None], use_reentrant=False)

    model, expected = built(lambda: Shared(checkpointed)), built(lambda: Shared(checkpointed))
    batches = batches_of([(8, 10)] * 4)
    with pytest.warns(UserWarning, match="is checkpointed around a layer that either side calls by itself"):
        run(wrapped(model), model, batches, mean)
    by_hand(expected, bases()["SGD"](expected), batches, mean, 1 / 4, stale=0)
    assert_same(model, expected, 1e-7)
