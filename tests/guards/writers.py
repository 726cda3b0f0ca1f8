"""Layers whose weights are written in the forward, by themselves or by somebody else, each in a way of its own."""

import torch
from torch import nn
from torch.nn import functional as F

BOUND = 0.4


def by_replacement(weight):
    weight.data = torch.renorm(weight.data, 2, 0, BOUND)


def through_data(weight):
    weight.data.renorm_(2, 0, BOUND)


def clamped_through_data(weight):
    weight.data.clamp_(-0.2, 0.2)


def nonnegative_through_data(weight):
    weight.data.clamp_(min=0)


def without_gradients(weight):
    with torch.no_grad():
        weight.copy_(BOUND * F.normalize(weight, dim=1))


def through_detached(weight):
    weight.detach().clamp_(-0.2, 0.2)


def decayed(weight):
    with torch.no_grad():
        weight.mul_(0.99)


def decayed_through_data(weight):
    weight.data.mul_(0.99)


def twice_replaced(weight):
    for _ in range(2):
        weight.data = 0.99 * torch.renorm(weight.data, 2, 0, BOUND)


WRITES = [
    by_replacement,
    through_data,
    clamped_through_data,
    nonnegative_through_data,
    without_gradients,
    through_detached,
    decayed,
    decayed_through_data,
    twice_replaced,
]


class Writing(nn.Linear):
    """Writes its own weight."""

    def __init__(self, write, *sizes):
        super().__init__(*sizes)
        self.write = write

    def forward(self, x):
        self.write(self.weight)
        return super().forward(x)


class Parent(nn.Module):
    """Writes its child's weight; the child is a layer like any other."""

    def __init__(self, write, *sizes):
        super().__init__()
        self.write = write
        self.child = nn.Linear(*sizes)

    def forward(self, x):
        self.write(self.child.weight)
        return self.child(x)


def hooked(write, *sizes):
    layer = nn.Linear(*sizes)
    layer.register_forward_pre_hook(lambda module, args: write(module.weight))
    return layer


class Convolution(nn.Conv1d):
    """As EEGNet's: a kernel that is no matrix."""

    def __init__(self, write, n, m):
        super().__init__(n, m, 1)
        self.write = write

    def forward(self, x):
        self.write(self.weight)
        return super().forward(x[..., None])[..., 0]


class Table(nn.Module):
    def __init__(self, write, n, m):
        super().__init__()
        self.table = nn.Embedding(n, m, max_norm=BOUND)

    def forward(self, x):
        return self.table(x.argmax(1))


class Bag(nn.Module):
    def __init__(self, write, n, m):
        super().__init__()
        self.table = nn.EmbeddingBag(n, m, max_norm=BOUND)

    def forward(self, x):
        return self.table(x.topk(2, dim=1).indices)


PLACES = {"itself": Writing, "parent": Parent, "hook": hooked, "convolution": Convolution}
CASES = [(place, write) for place in PLACES.values() for write in WRITES] + [(Table, decayed), (Bag, decayed)]
NAMES = [f"{place}, {write.__name__}" for place in PLACES for write in WRITES] + ["Embedding", "EmbeddingBag"]


def model_with(place, write, dtype=torch.float64):
    torch.manual_seed(5)
    return nn.Sequential(place(write, 6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
