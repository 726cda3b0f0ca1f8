"""Small matrices as copies for groups of samples: the same steps as by a function for each layer, and by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nusam.one_pass import copies
from tests.test_one_pass import (
    CASES,
    Attentive,
    assert_same,
    bases,
    built,
    by_hand,
    mean,
    run,
    token_batches,
    wrapped,
)


@pytest.fixture
def multiplied(monkeypatch):
    """The shapes of the matrices whose copies were multiplied with, in order."""
    seen = []
    original = copies.by_copies

    def noted(copy, x, bias):
        seen.append(tuple(copy.matrices.shape))
        return original(copy, x, bias)

    monkeypatch.setattr("nusam.one_pass.apart.by_copies", noted)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_without_copies_the_steps_are_those_by_hand_too(case, monkeypatch, multiplied):
    monkeypatch.setattr(copies, "LARGEST", 0)
    kind, options, loss = CASES[case]
    model, expected, batches = built(kind, **options), built(kind), token_batches(8)
    run(wrapped(model), model, batches, loss)
    by_hand(expected, bases()["SGD"](expected), batches, loss)
    assert_same(model, expected)
    assert not multiplied


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("share", [1, 1 / 2, 3 / 8, 1 / 8])
def test_groups_of_samples(share, size, multiplied):
    model, expected, batches = built(), built(), [tokens[:size] for tokens in token_batches(8)]
    run(wrapped(model, share=share), model, batches, mean)
    by_hand(expected, bases()["SGD"](expected), batches, mean, share)
    assert_same(model, expected)
    behind = -int(-size * share // 1)
    groups = {shape[0] for shape in multiplied}
    assert groups == {(size + behind) // torch.tensor(size).gcd(torch.tensor(behind)).item()}


class Shared(nn.Module):
    """A layer without a bias that is used twice, one that meets the same positions for all, and one that comes late."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.twice, self.places = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.register_buffer("angles", torch.linspace(0, 1, 30).view(1, 5, 6))
        self.expands = lambda: False

    def forward(self, tokens):
        x = self.table(tokens)
        angles = self.angles.to(x.dtype)
        x = x + self.places(angles.expand(len(x), -1, -1) if self.expands() else angles)
        x = torch.tanh(self.twice(x))
        return self.head(torch.tanh(self.twice(x)))


@pytest.mark.parametrize("until", [0, 4, 5, 12])
def test_a_layer_that_copies_suit_for_some_of_the_steps(until, multiplied):
    """Comparisons come in certain steps; in between a layer may be called otherwise than it was then."""
    model, expected, batches = built(Shared), built(Shared), token_batches(12)
    step = 0
    model.expands = lambda: step < until
    opt = wrapped(model)
    for _ in opt.one_pass(batches, lambda batch: mean(model, batch)):
        opt.step()
        step += 1
    assert not opt._one_pass._refused
    by_hand(expected, bases()["SGD"](expected), batches, mean)
    assert_same(model, expected)
    assert multiplied


def test_a_layer_that_a_step_leaves_out_gets_no_gradient(multiplied):
    """Zeros would be a gradient: weights would decay, and momentum go on."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.skips = self.drops = False

        def forward(self, x):
            x = torch.tanh(self.first(x))
            if not self.skips:
                y = torch.tanh(self.second(x))
                x = x if self.drops else y
            return self.head(x)

    model = built(Skips)
    batches = [torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    opt = wrapped(model, power_iterations=1)
    with_gradient = []
    with pytest.warns(UserWarning, match=r"second.weight got a gradient in the descent and none"):  # noqa: PT031
        for step, _ in enumerate(opt.one_pass(batches, lambda x: model(x).square().mean())):
            with_gradient.append(model.second.weight.grad is not None)
            assert model.first.weight.grad is not None
            opt.step()
            model.skips, model.drops = step == 5, step == 7
    assert with_gradient == [step not in (6, 8) for step in range(12)]
    assert multiplied


def test_gradients_are_apart_in_memory(multiplied):
    model, batches = built(), token_batches(6)
    opt = wrapped(model, power_iterations=1)
    for _ in opt.one_pass(batches, lambda batch: mean(model, batch)):
        gradients = [p.grad for p in model.parameters()]
        assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)
        versions = [g._version for g in gradients]
        gradients[0].zero_()
        assert [g._version for g in gradients[1:]] == versions[1:]
        opt.step()
    assert multiplied


def test_a_hook_on_a_weight_sees_the_gradient_of_this_batch(multiplied):
    """Until the next comparison, which refuses it."""
    model, batches, seen = built(), token_batches(9), []
    weight = model.body[0].weight
    for step, _ in enumerate(wrapped(model, power_iterations=1).one_pass(batches, lambda batch: mean(model, batch))):
        if step == 5:
            weight.register_hook(seen.append)
            multiplied.clear()
        if step == 6:
            assert torch.equal(seen.pop(), weight.grad)
            break
    assert (5, 6, 8) in multiplied


def test_under_autocast_there_are_none(multiplied):
    model, batches = built(Attentive, dtype=torch.float32), token_batches(8)
    opt = wrapped(model, power_iterations=1)

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    for _ in opt.one_pass(batches, loss):
        opt.step()
    assert not opt._one_pass._refused
    assert not multiplied
