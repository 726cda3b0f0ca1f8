"""What a pass does to its batch, however it holds it, is not there any more for the next pass."""

import collections
import dataclasses
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import nusam
from nusam.guards.handing import in_own_containers


@dataclasses.dataclass
class Plain:
    x: object


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    x: object


class Listed(list):
    pass


class Named(dict):
    pass


def tensor():
    return torch.full((8, 6), 4.0, dtype=torch.float64)


def rows(x):
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def halve(x):
    x /= 2
    return rows(x)


def bind(batch):
    batch.x = batch.x / 2
    return rows(batch.x)


def force(batch):
    object.__setattr__(batch, "x", batch.x / 2)
    return batch.x


def through_data(x):
    x.data.div_(2)
    return x


def rebind_data(x):
    x.data = x.data.float() / 2
    return x.double()


def through_numpy(x):
    x.numpy()[...] /= 2
    return x


def turn(x):
    return x.transpose_(0, 1).div_(2).T


def differentiate(x):
    x.requires_grad_()
    x.square().mean().backward()
    return (x + x.grad).detach()


def count(thing, x):
    thing.calls = getattr(thing, "calls", 0) + 1
    return x / thing.calls


WRITES = {
    "an array": (lambda: tensor().numpy(), halve),
    "an array through a tensor": (lambda: tensor().numpy(), lambda x: torch.from_numpy(x).div_(2)),
    "an array in a dictionary": (lambda: {"x": tensor().numpy()}, lambda batch: halve(batch["x"])),
    "an array of objects": (lambda: np.array([tensor(), None], dtype=object), lambda batch: halve(batch[0])),
    "an attribute": (lambda: types.SimpleNamespace(x=tensor()), bind),
    "an attribute that is an array": (lambda: types.SimpleNamespace(x=tensor().numpy()), bind),
    "a tensor in an attribute": (lambda: types.SimpleNamespace(x=tensor()), lambda batch: halve(batch.x)),
    "attributes of attributes": (lambda: {"a": [Plain(Plain(tensor().numpy()))]}, lambda b: halve(b["a"][0].x.x)),
    "a slot": (lambda: Slotted(tensor()), force),
    "an attribute of a dictionary": (lambda: Named(x=tensor()), lambda batch: count(batch, batch["x"])),
    "an attribute of a tensor": (tensor, lambda x: count(x, x)),
    "a list of its own kind": (lambda: Listed([tensor()]), lambda batch: batch.pop() / 2),
    "a deque": (lambda: collections.deque([tensor()]), lambda batch: batch.popleft() / 2),
    "a set": (lambda: {tensor()}, lambda batch: halve(batch.pop())),
    "a generator": (lambda: [tensor(), np.random.default_rng(0)], lambda batch: batch[0] * batch[1].random()),
    "torch's generator": (lambda: [tensor(), torch.Generator()], lambda b: b[0] * torch.rand((), generator=b[1])),
    "a tensor through .data": (tensor, through_data),
    "another .data": (tensor, rebind_data),
    "a tensor through numpy": (tensor, through_numpy),
    "the shape of a tensor": (tensor, turn),
    "the gradient of a tensor": (tensor, differentiate),
    "a tensor, by something with a graph": (tensor, lambda x: x.mul_(nn.Parameter(torch.tensor(0.5).double()))),
}


@pytest.mark.parametrize("what", WRITES)
def test_every_pass_finds_the_batch_as_the_first_one_did(what):
    make, write = WRITES[what]
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for _ in range(3):
        seen = []
        for batch in opt.passes(make()):
            x = write(batch)
            seen.append(x.detach().clone())
            model(x).square().mean().backward()
        opt.step()
        assert torch.equal(*seen)


UNTOLD = {"through .data": through_data, "through numpy": through_numpy}


@pytest.mark.parametrize("what", UNTOLD)
@pytest.mark.parametrize("first", range(1, 20, 3))
def test_a_write_that_no_tensor_tells_and_that_begins_late_is_found_soon_and_told_once(what, first):
    """In the steps 4, 8, 16, …: from then on every pass finds the batch as the first one did."""
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    are_same = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(1, 34):
            seen = []
            for x in opt.passes(tensor()):
                if step >= first:
                    UNTOLD[what](x)
                seen.append(x.clone())
                model(x).square().mean().backward()
            opt.step()
            are_same.append(torch.equal(*seen))
    found = first if first == 1 else next(2**k for k in range(2, 7) if 2**k >= first)
    assert are_same == [not first <= step < found for step in range(1, 34)]
    assert ["through .data or numpy" in str(warning.message) for warning in told] == [True] * (first > 1)


def test_other_memory_is_taken_back_whenever_it_comes():
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for step in range(12):
        for x in opt.passes(tensor()):
            assert (x == 4).all()
            x = rebind_data(x) if step > 4 else x
            model(x).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("what", ["an array", "an array in a dictionary", "a tensor through .data"])
def test_so_it_is_beside_a_share(what):
    make, write = WRITES[what]
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent_share=1 / 4)
    for _ in range(3):
        for batch in opt.passes(make()):
            x = write(batch)
            assert (x == 2).all()
            model(x).square().mean().backward()
        opt.step()


def test_what_a_batch_merely_refers_to_is_left_alone():
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    batch = types.SimpleNamespace(x=tensor(), model=model, calls=[])
    for _ in opt.passes(batch):
        batch.model.note = "of the loop"
        model(batch.x).square().mean().backward()
    opt.step()
    assert model.note == "of the loop"


@pytest.mark.parametrize("wrap", [lambda batches: batches, lambda batches: {"micro": batches}])
def test_an_iterator_is_refused_since_it_gives_every_pass_other_samples(wrap):
    model = nn.Linear(6, 3).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(TypeError, match=r"was given a list_iterator, an iterator, .* hand over a list of what"):
        next(opt.passes(wrap(iter([tensor(), tensor()]))))
    assert opt._pass is None


class Node:
    """An object of a batch that knows what it is part of, as nodes of a tree do."""

    def __init__(self, x: torch.Tensor, above: "Node | None" = None) -> None:
        self.x, self.above, self.below = x, above, list["Node"]()
        if above is not None:
            above.below.append(self)


def test_objects_that_hold_each_other_are_made_anew_once() -> None:
    root = Node(torch.ones(2))
    leaf = Node(torch.zeros(2), root)
    own = in_own_containers({"root": root, "leaf": leaf}, torch.clone)
    assert own["root"] is not root
    assert own["root"].below == [own["leaf"]]
    assert own["leaf"].above is own["root"]
    own["leaf"].x += 1
    assert not leaf.x.any()
