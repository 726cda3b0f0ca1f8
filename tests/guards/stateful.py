"""Modules whose training forward moves something that the next forward reads, each in a way of its own."""

import copy

import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn import functional as F
from torch.nn.utils import parametrizations

LARGE = 2**16  # entries; a large buffer has more


class GhostBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        shared = (self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        halves = [F.batch_norm(half, *shared) for half in x.chunk(2)]
        return torch.cat(halves)


class AssignedStatistics(nn.Module):
    """A batch norm of one's own: every forward puts new tensors in place, and they are used."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = (x - self.mean) / (self.var + 1e-3).sqrt()
        if self.training:
            self.count = self.count + 1
            self.mean = 0.7 * self.mean + 0.3 * x.mean(0).detach()
            self.var = 0.7 * self.var + 0.3 * x.var(0).detach()
        return y


class Codebook(nn.Module):
    """Moves in place; begun from the first batch, which a plain attribute remembers."""

    def __init__(self, width, entries=5):
        super().__init__()
        self.register_buffer("book", torch.full((entries, width), float("nan")))
        self.register_buffer("hits", torch.zeros(entries))
        self.begun = False

    def forward(self, x):
        with torch.no_grad():
            if not self.begun:
                self.book.copy_(x[torch.arange(len(self.book)) % len(x)])
                self.begun = True
            nearest = torch.cdist(x, self.book).argmin(1)
            quantized = self.book[nearest]
            if self.training:
                self.book.index_add_(0, nearest, 0.1 * (x - quantized))
                self.hits += torch.bincount(nearest, minlength=len(self.hits))
        return x + 0.3 * (quantized - x).detach() + 0.01 * self.hits.sum()


class Queue(nn.Module):
    """A ring whose position is a plain number."""

    def __init__(self, width, length=24, through_data=False):
        super().__init__()
        self.register_buffer("queue", torch.zeros(length, width))
        self.position = 0
        self.through_data = through_data

    def forward(self, x):
        y = x + torch.tanh(x @ self.queue.T.clone()).mean(1, keepdim=True)
        if self.training:
            rows = (self.position + torch.arange(len(x))) % len(self.queue)
            target = self.queue.data if self.through_data else self.queue
            with torch.no_grad():
                target[rows] = x.detach()
            self.position = (self.position + len(x)) % len(self.queue)
        return y


class GrowingMemory(nn.Module):
    def __init__(self, width, how):
        super().__init__()
        self.register_buffer("memory", torch.zeros(1, width))
        self.how = how

    def forward(self, x):
        y = x + self.memory.mean(0)
        if self.training:
            grown = torch.cat([self.memory, x.detach()[:2]])
            if self.how == "assigned":
                self.memory = grown
            elif self.how == "data":
                self.memory.data = grown
            else:
                with torch.no_grad():
                    self.memory.resize_(grown.shape).copy_(grown)
        return y


class AbsentAtFirst(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        now = x.detach().mean(0)
        self.mean = now if self.mean is None else 0.5 * self.mean + 0.5 * now
        return x - self.mean


class Fading(nn.Module):
    """Reads what it keeps, and forgets a tenth of it every time."""

    def __init__(self, width, entries):
        super().__init__()
        self.register_buffer("kept", torch.ones(entries))

    def forward(self, x):
        y = x * self.kept[0]
        if self.training:
            self.kept.data.mul_(0.9)  # no version counter sees it
        return y


class Router(nn.Module):
    """Load balancing without a loss: a bias that moves by the counts."""

    def __init__(self, width, experts=4):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x):
        scores = self.gate(x)
        chosen = (scores + self.bias).argmax(1)
        if self.training:
            with torch.no_grad():
                counts = torch.bincount(chosen, minlength=len(self.bias)).to(x.dtype)
                self.bias += 0.1 * torch.sign(len(x) / len(self.bias) - counts)
        return x * scores.softmax(1).gather(1, chosen[:, None])


class Momentum(nn.Module):
    """A frozen copy of a layer that follows it in every forward, as contrastive methods have it."""

    def __init__(self, width, how, rows=None):
        super().__init__()
        self.width = width
        self.fast = nn.Linear(width, rows or width)
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.how = how

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                if self.how == "replaced":
                    slow.data = slow.data * 0.8 + fast.data * 0.2
                elif self.how == "in place":
                    slow.mul_(0.8).add_(fast, alpha=0.2)
                elif self.how == "through .data":
                    slow.data.mul_(0.8).add_(fast.data, alpha=0.2)
                else:
                    slow.data.copy_(fast.data)
            target = self.slow(x)
        return (self.fast(x) * target)[:, : self.width]


KINDS = {
    "batch norm": nn.BatchNorm1d,
    "cumulative batch norm": lambda n: nn.BatchNorm1d(n, momentum=None),
    "ghost batch norm": GhostBatchNorm,
    "statistics by assignment": AssignedStatistics,
    "codebook": Codebook,
    "large codebook": lambda n: Codebook(n, LARGE // n + 1),
    "queue": Queue,
    "large queue": lambda n: Queue(n, LARGE // n + 1),
    "large queue through .data": lambda n: Queue(n, LARGE // n + 1, through_data=True),
    "growing memory, assigned": lambda n: GrowingMemory(n, "assigned"),
    "growing memory, .data": lambda n: GrowingMemory(n, "data"),
    "growing memory, resized": lambda n: GrowingMemory(n, "resized"),
    "absent at first": AbsentAtFirst,
    "fading": lambda n: Fading(n, 3),
    "large and fading": lambda n: Fading(n, LARGE + 1),
    "spectral norm": lambda n: parametrizations.spectral_norm(nn.Linear(n, n)),
    "spectral norm, old": lambda n: nn.utils.spectral_norm(nn.Linear(n, n)),
    "observer": lambda n: FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    "router": Router,
    "momentum copy, in place": lambda n: Momentum(n, "in place"),
    "momentum copy, replaced": lambda n: Momentum(n, "replaced"),
    "momentum copy, through .data": lambda n: Momentum(n, "through .data"),
    "large momentum copy, through .data": lambda n: Momentum(n, "through .data", LARGE // n + 1),
    "momentum copy, equal in every forward": lambda n: Momentum(n, "copied"),
}


def model_with(kind, width=8, dtype=torch.float64):
    """A small network around one such module, on six inputs and with four outputs."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, width), KINDS[kind](width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
