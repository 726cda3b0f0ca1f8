"""One pass: what is one for all samples stays one, also where both sides have as many samples as each other."""

import dataclasses
import functools
from collections import namedtuple

import pytest
import torch
from torch import nn

from tests.test_batch import Hidden
from tests.test_one_pass import assert_same, by_hand, run, wrapped
from tests.test_one_pass_losses import mlp, plainly, samples
from tests.test_one_pass_neighbours import REFUSED

MASK = torch.triu(torch.ones(6, 6, dtype=torch.float64))
Pair = namedtuple("Pair", "rows mask")


@dataclasses.dataclass
class Given:
    rows: list
    mask: torch.Tensor


def stacked(rows):
    return torch.stack([row.view(-1, 6).mean(0) for row in rows])


def ragged(x):
    """Sequences of several lengths."""
    return [row.expand(1 + number % 3, 6).clone() for number, row in enumerate(x)]


def masked(x, mask):
    assert mask.shape == MASK.shape
    return x @ mask


# what the model is given, all of which is made anew for either side, and what it makes of it
ARGUMENTS = {
    "a list of samples": (lambda x: [row.view(1, 6) for row in x], stacked),
    "a list of as many rows": (lambda x: [row.expand(len(x), 6).clone() for row in x], stacked),
    "a tuple of samples": (lambda x: tuple(x), stacked),
    "sequences": (ragged, stacked),
    "a list in a dictionary": (lambda x: {"rows": ragged(x), "n": [1] * len(x)}, lambda d: stacked(d["rows"])),
    "equal lengths": (lambda x: (x, [3] * len(x)), lambda d: d[0] * torch.tensor(d[1]).view(len(d[0]), 1)),
    "a mask": (lambda x: (x, MASK.clone()), lambda d: masked(*d)),
    "a mask in a list": (lambda x: [x, MASK.clone()], lambda d: masked(*d)),
    "positions": (lambda x: (x, torch.arange(6.0)), lambda d: d[0] + d[1]),
    "tensors side by side": (lambda x: [x, x * 2], lambda d: d[0] + d[1]),
    "sizes": (lambda x: (x, [2, 2]), lambda d: d[0] * len(d[1])),
    "a named tuple": (lambda x: Pair(ragged(x), MASK.clone()), lambda d: masked(stacked(d.rows), d.mask)),
    "a dataclass": (lambda x: Given(ragged(x), MASK.clone()), lambda d: masked(stacked(d.rows), d.mask)),
}


class Prepared(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = mlp(), how

    def forward(self, given):
        return self.net(self.how(given))


def cut_to(*counts):
    return [x[:count] for x, count in zip(samples(len(counts), 6), counts, strict=True)]


@pytest.mark.parametrize(("counts", "share"), [((8, 8, 8, 1, 8, 8), 1 / 8), ((8, 8, 8, 2, 8, 8), 1 / 4)])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.filterwarnings("error")
def test_a_batch_of_as_many_samples_as_travel_behind_it(name, counts, share):
    """As the last one of an epoch, before the first one of the next."""
    make, how = ARGUMENTS[name]
    model, expected, batches = Prepared(how), Prepared(how), cut_to(*counts)

    def loss(model, x):
        return (model(make(x)) - 1).square().mean()

    run(wrapped(model, share=share), model, batches, loss)
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, loss, share)
    assert_same(model, expected)


@pytest.mark.parametrize("name", ["sequences", "a list in a dictionary", "a mask", "a named tuple"])
@pytest.mark.filterwarnings("ignore:one_pass.. can't tell")
def test_batches_of_which_all_are_as_large_as_what_travels_behind_them(name):
    make, how = ARGUMENTS[name]
    model, expected, batches = Prepared(how), Prepared(how), samples(6, 6)
    opt = wrapped(model, share=1)

    def loss(model, x):
        return (model(make(x)) - 1).square().mean()

    run(opt, model, batches, loss)
    stale = not opt._refused
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, loss, 1, stale)
    assert_same(model, expected)


class Optional(nn.Module):
    """Is given a mask in some steps, which hides nothing."""

    def __init__(self):
        super().__init__()
        self.net, self.is_masked = mlp(), False

    def forward(self, x, mask=None):
        return self.net(x if mask is None else masked(x, mask))


def test_what_a_call_was_not_given_before_is_not_guessed():
    model, expected, batches = Optional(), mlp(), cut_to(8, 8, 8, 8, 8, 1, 8, 8)
    opt = wrapped(model, share=1 / 8)

    def loss(x):
        given = (torch.eye(6, dtype=torch.float64),) if model.is_masked else ()
        return (model(x, *given) - 1).square().mean()

    def train():
        for step, _ in enumerate(opt.one_pass(batches, loss)):
            opt.step()
            model.is_masked = step == 4

    with pytest.warns(UserWarning, match="gets arguments that it did not get before; such a step is followed by one"):
        train()
    by_hand(
        expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly, 1 / 8,
        carries=[number != 5 for number in range(8)],
    )  # fmt: skip
    assert_same(model.net, expected)


class Hiding(nn.Module):
    """Gives what no copy can be filled of."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Hidden(y=self.net(x))


def test_an_output_that_can_not_be_taken_apart_stays_with_its_samples():
    model, expected, batches = Hiding(), mlp(), samples(6, 6)
    with pytest.warns(UserWarning, match="gives a Hidden, which can't be rebuilt; from now on every step takes"):
        run(wrapped(model), model, batches, lambda model, x: (model(x)["y"] - 1).square().mean())
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly, stale=0)
    assert_same(model.net, expected)


class Late(nn.Module):
    """Begins to return what has no samples."""

    def __init__(self, what):
        super().__init__()
        self.net, self.what, self.is_late = mlp(), what, False

    def forward(self, x):
        y = self.net(x)
        return (y, self.what(y)) if self.is_late else (y,)


@pytest.mark.parametrize("what", [torch.mean, lambda y: y.sum(0), lambda y: y.mean(0, keepdim=True)])
def test_an_output_that_is_one_for_the_samples_of_both_is_not_handed_out(what):
    def values(batches):
        model = Late(what)
        opt, found = wrapped(model, power_iterations=1), []
        for value in opt.one_pass(batches, lambda x: functools.reduce(lambda a, b: a + b.sum() ** 2, model(x), 0.0)):
            found.append(float(value))
            opt.step()
            model.is_late = len(found) >= 5
        return found

    batches = samples(8, 6)
    with pytest.warns(UserWarning, match=REFUSED):
        expected = values(batches)
    changed = [*batches[:6], batches[6] * 10, batches[7]]
    with pytest.warns(UserWarning, match=REFUSED):
        assert values(changed)[5] == expected[5]
