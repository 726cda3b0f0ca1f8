"""State that two passes would move twice, and weights that change in the forward"""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _Layer(Loop):
    layer: type[nn.Module]

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), self.layer(12), nn.Tanh(), nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class BatchStatisticsMoveOnce(_Layer):
    """nn.BatchNorm1d"""

    layer = nn.BatchNorm1d


class _GhostNorm(nn.BatchNorm1d):
    def forward(self, x):
        stats = self.running_mean, self.running_var
        parts = [F.batch_norm(c, *stats, self.weight, self.bias, self.training, 0.1, self.eps) for c in x.chunk(2)]
        return torch.cat(parts)


class GhostBatchesMoveOnce(_Layer):
    """Ghost batch norm: a subclass of nn.BatchNorm1d with a forward of its own"""

    dtypes = DOUBLE
    layer = _GhostNorm


class _OwnNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # a new tensor, not in place
        return x - self.mean


class ANormOfOnesOwnMovesOnce(_Layer):
    """A running mean of one's own, which is also what is subtracted, replaced in every forward"""

    dtypes = ALL
    layer = _OwnNorm


class _Codebook(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("book", torch.linspace(-1, 1, 5)[:, None].repeat(1, n))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        index = torch.cdist(x.float(), self.book.float()).argmin(1)
        if self.training:
            with torch.no_grad():
                self.book.index_add_(0, index, (0.1 * (x - self.book[index])).to(self.book.dtype))
                self.updates += 1
        return x + (self.book[index] - x).detach()


class ACodebookMovesOnce(_Layer):
    """VQ-VAE: a codebook kept by moving averages, straight-through"""

    dtypes = DOUBLE
    layer = _Codebook


class _Observer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.low.lerp_(x.detach().min(), 0.3)
            self.high.lerp_(x.detach().max(), 0.3)
        return x + (x.clamp(self.low, self.high) - x).detach()


class ObserversMoveOnce(_Layer):
    """Quantization-aware training: an observer of the range, straight-through"""

    dtypes = DOUBLE
    layer = _Observer


class AQueueMovesOnce(Loop):
    """MoCo: a momentum encoder, a queue of keys as a buffer, and its pointer"""

    dtypes = ALL

    def build(self):
        return _Contrast()

    def loss(self, step):
        return self.model(self.normal(step, 4, 6), self.normal(step + 50, 4, 6))


class _Contrast(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = mlp(6, 12, 12), mlp(6, 12, 12)
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.linspace(-1, 1, 96).view(8, 12))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, a, b):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.lerp_(q, 0.05)
            keys = self.key(b)
        q = self.query(a)
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ self.queue.clone().T], 1)
        with torch.no_grad():
            start = int(self.at)
            self.queue[start : start + len(keys)] = keys
            self.at.fill_((start + len(keys)) % len(self.queue))
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64)) + to_target(q)


class _Router(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate = nn.Linear(n, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(n, n) for _ in range(4))
        self.register_buffer("balance", torch.zeros(4))

    def forward(self, x):
        scores = self.gate(x)
        index = (scores + self.balance).mean(0).argmax()
        if self.training:
            with torch.no_grad():
                self.balance -= 0.2 * F.one_hot(index, 4).to(self.balance.dtype)
        return scores.softmax(1)[:, index, None] * self.experts[int(index)](x)


class ARoutersBiasMovesOnce(_Layer):
    """Mixture of experts balanced without a loss: a buffer beside the router's scores"""

    layer = _Router


class PythonsGeneratorIsReplayed(Loop):
    """Augmentation and layer drop by Python's random"""

    dtypes = ALL

    def loss(self, step):
        scale = random.uniform(0.5, 1.5)
        h = self.model[:2](scale * self.normal(step, 8, 6))
        return to_target(self.model[3:](self.model[2](h) if random.random() < 0.7 else h))


class NumpysGeneratorIsReplayed(Loop):
    """Masked spans by numpy's generator, as in speech models, and mixup"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 8, 6).clone()
        x[:, np.random.randint(0, 6)] = 0
        x = x.lerp(x.flip(0), float(np.random.beta(0.5, 0.5)))
        return to_target(self.model(x))


class MasksAreTheSameInBothPasses(Loop):
    """Dropout between all layers"""

    def build(self):
        layers = nn.Linear(6, 12), nn.Dropout(0.3), nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.3), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class StatisticsMayMoveTwiceInAPass(Loop):
    """Batch norm in a net that is called for two domains, each with its backward"""

    dtypes = DOUBLE

    def build(self):
        layers = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8)
        return nn.Sequential(*layers)

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        to_target(self.model(self.normal(step + 50, 8, 6, shift=0)), -1).backward()


class TablesRenormalizedInTheForwardAreRestored(Loop):
    """nn.Embedding(max_norm=), which renormalizes the rows it looks up"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(10, 12, max_norm=1.5), "out": nn.Linear(12, 8)})

    def loss(self, step):
        return to_target(self.model["out"](1 + self.model["table"](self.whole(step, 10, 8))))


class _MaxNorm(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.7)
        return super().forward(x)


class _Projected(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class LayersRenormalizedInTheForwardAreRestored(Loop):
    """EEGNet's max-norm layer: weight.data is replaced by its renormalized self in every forward"""

    dtypes = ALL
    layer: type[nn.Module] = _MaxNorm

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), self.layer(12, 12), nn.Tanh(), nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class LayersClampedInTheForwardAreRestored(LayersRenormalizedInTheForwardAreRestored):
    """A layer that clamps its weight in place in every forward"""

    dtypes = DOUBLE
    layer = _Projected


class ACriticMayBeClippedInThePass(Loop):
    """WGAN: the critic's weights are clipped at the start of each pass"""

    dtypes = ALL

    def build(self):
        return mlp(6, 12, 12, 1)

    def as_it_writes(self, weight):
        return weight.clamp(-0.25, 0.25)

    def backward(self, step):
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(self.as_it_writes(p))
        fake = self.normal(step + 50, 8, 6, shift=0)
        (self.model(fake).mean() - self.model(self.normal(step, 8, 6)).mean()).backward()


class ACriticMayBeClippedAfterTheStep(Loop):
    """WGAN: the critic's weights are clipped after each step"""

    dtypes = DOUBLE

    def build(self):
        return mlp(6, 12, 12, 1)

    def loss(self, step):
        return self.model(self.normal(step + 50, 8, 6, shift=0)).mean() - self.model(self.normal(step, 8, 6)).mean()

    def step(self, step):
        super().step(step)
        with torch.no_grad():
            for p in self.model.parameters():
                p.clamp_(-0.25, 0.25)
