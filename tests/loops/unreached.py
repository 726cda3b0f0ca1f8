"""Layers that some steps don't reach"""

import random

import torch
from torch import nn

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _Experts(Loop):
    def build(self):
        parts = {"body": mlp(6, 12, 12), **{name: nn.Linear(12, 8) for name in "abc"}}
        return nn.ModuleDict(parts)

    def heads(self, step):
        raise NotImplementedError

    def loss(self, step):
        h = self.model["body"](self.normal(step, 8, 6)).tanh()
        return sum(to_target(self.model[name](h), k + 1) for k, name in enumerate(self.heads(step)))


class TasksMayTakeTurns(_Experts):
    """A head for every task, one task a step"""

    dtypes = ALL
    steps = 9

    def heads(self, step):
        return "abacabcab"[step]


class AHeadMayJoinLater(_Experts):
    """A head that nobody uses until the fifth step"""

    dtypes = ALL

    def heads(self, step):
        return "a" if step < 4 else "ab"


class AHeadMayRest(_Experts):
    """A head that is used, rests from the third step on and returns in the sixth"""

    dtypes = DOUBLE

    def heads(self, step):
        return "ab" if step < 2 or step >= 5 else "a"


class AHeadMayNeverBeUsed(_Experts):
    """A matrix that the optimizer holds and no step reaches"""

    dtypes = DOUBLE

    def heads(self, step):
        return "ab"


class ExpertsMayIdle(Loop):
    """Top-1 routing by sample: experts see some of the batch, or nothing"""

    def build(self):
        return nn.ModuleDict({"gate": nn.Linear(6, 4), **{f"e{k}": mlp(6, 12, 8) for k in range(4)}})

    def loss(self, step):
        x = self.normal(step, 8, 6)
        weights, index = self.model["gate"](x).softmax(1).max(1)
        index = (index + torch.arange(8) % 2 + step) % 4  # so that who idles changes
        y = torch.zeros(8, 8, dtype=self.dtype)
        for k in range(4):
            chosen = index == k
            if chosen.any():
                y = y.index_put((chosen.nonzero().squeeze(1),), self.model[f"e{k}"](x[chosen]))
        return to_target(y * weights[:, None])


class BlocksMayBeDropped(Loop):
    """Stochastic depth: residual blocks are skipped as torch's generator says"""

    steps = 9

    def build(self):
        return nn.ModuleDict({"input": nn.Linear(6, 12), **{f"b{k}": mlp(12, 16, 12) for k in range(3)}})

    def loss(self, step):
        h = self.model["input"](self.normal(step, 8, 6))
        for k in range(3):
            if torch.rand(()) < 0.6:
                h = h + self.model[f"b{k}"](h)
        return to_target(h)


class DropsMayFollowAnotherGenerator(Loop):
    """Layer drop by Python's random, as some speech models have it"""

    dtypes = DOUBLE
    steps = 9

    def build(self):
        return nn.ModuleDict({"input": nn.Linear(6, 12), **{f"b{k}": mlp(12, 16, 12) for k in range(3)}})

    def loss(self, step):
        h = self.model["input"](self.normal(step, 8, 6))
        for k in range(3):
            if random.random() < 0.6:
                h = h + self.model[f"b{k}"](h)
        return to_target(h)


class OneOptimizersBatchMayMissTheOther(Loop):
    """Two optimizers, of which one's parameters get no gradient in some batches"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"body": mlp(6, 12, 12), "rare": nn.Linear(12, 8), "often": nn.Linear(12, 8)})

    def optimizers(self):
        parts = nn.ModuleList([self.model["body"], self.model["often"]]), self.model["rare"]
        bases = [torch.optim.SGD(part.parameters(), lr=self.lr, momentum=0.9) for part in parts]
        return [(base, self.model) for base in bases]

    def step(self, step):
        heads = ("often", "rare") if step in (0, 3, 4, 6) else ("often",)
        for driver, heads_of in zip(self.drivers, (("often",), heads), strict=True):
            x = self.normal(step, 8, 6)
            driver.passes(lambda x=x, names=heads_of: self.head_loss(x, names).backward())
            driver.update()

    def head_loss(self, x, names):
        h = self.model["body"](x).tanh()
        return sum(to_target(self.model[name](h)) for name in names)


class ExitsMayBeEarly(Loop):
    """Early exits: later blocks get nothing where an early head is sure"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"first": mlp(6, 12, 12), "exit": nn.Linear(12, 8), "rest": mlp(12, 12, 8)})

    def loss(self, step):
        h = self.model["first"](self.normal(step, 8, 6)).tanh()
        return to_target(self.model["exit"](h)) + (0 if step in (1, 4) else to_target(self.model["rest"](h)))


class ALossMayBeZero(Loop):
    """A batch whose every label is masked: gradients are there, and zero"""

    dtypes = ALL

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6))) * (0.0 if step in (2, 5) else 1.0)


class ATableOfManyIdsIsAlwaysPerturbed(Loop):
    """A recommender: 4,000 ids of which a batch touches eight; the table's gradient lives on new rows in every step"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"table": nn.Embedding(4000, 8), "out": nn.Linear(8, 8)})

    def loss(self, step):
        return to_target(self.model["out"](1 + self.model["table"](self.whole(step, 4000, 8))))
