"""Calls without gradients"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, FULL, Loop, mlp, to_target


class PseudoLabelsMayBeMade(Loop):
    """FixMatch: labels for a strong view come from the model itself, without gradients"""

    dtypes = ALL

    def loss(self, step):
        x = self.normal(step, 8, 6)
        with torch.no_grad():
            target = self.model(x) + 1
        return F.mse_loss(self.model(1.2 * x + 0.1 * self.noise(8, 6)), target)


class ATeacherMayLiveInTheModel(Loop):
    """Mean Teacher: the averaged copy is a part of the model and sees each batch without gradients"""

    dtypes = DOUBLE

    def build(self):
        student = mlp(6, 12, 12, 3)
        return nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})

    def loss(self, step):
        x = self.normal(step, 8, 6)
        with torch.no_grad():
            target = self.model["teacher"](x)
        y = self.model["student"](x)
        return to_target(y) + F.mse_loss(y, target)

    def step(self, step):
        super().step(step)
        with torch.no_grad():
            for t, s in zip(self.model["teacher"].parameters(), self.model["student"].parameters(), strict=True):
                t.lerp_(s, 0.2)


class _Preference(Loop):
    def build(self):
        return _Lora()

    def loss(self, step):
        chosen, rejected = self.normal(step, 8, 6), self.normal(step + 50, 8, 6, shift=0)
        self.model.on = False
        with torch.no_grad():
            reference = (self.model(chosen) - self.model(rejected)).mean(1)
        self.model.on = True
        margin = (self.model(chosen) - self.model(rejected)).mean(1)
        return -F.logsigmoid(margin - reference - 1).mean()


class _Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 12).requires_grad_(False)
        self.head = nn.Linear(12, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 8, bias=False), nn.Linear(8, 12, bias=False)
        self.on = True

    def forward(self, x):
        y = self.base(x)
        return self.head((y + self.up(self.down(x)) if self.on else y).tanh())


class AReferenceMayBeTheModelItself(_Preference):
    """DPO with LoRA: the reference is the model with its adapters off"""


class AReferenceMayBeFrozenAndPerturbed(_Preference):
    """The same, where the frozen weights are what is perturbed"""

    dtypes = ALL
    frozen = True


class AModelMayConditionOnItself(Loop):
    """Self-conditioning diffusion: in half of the steps an estimate without gradients is an input"""

    dtypes = DOUBLE

    def build(self):
        return mlp(9, 12, 12, 3)

    def loss(self, step):
        x, estimate = self.normal(step, 8, 6), torch.zeros(8, 3, dtype=self.dtype)
        if torch.rand(()) < 0.5:
            with torch.no_grad():
                estimate = self.model(torch.cat([x, estimate], 1))
        return to_target(self.model(torch.cat([x, estimate], 1)))


class RepresentationsMayBeCached(Loop):
    """GradCache: all representations without gradients, their gradients cached, then a backward for each chunk"""

    dtypes = ALL

    def backward(self, step):
        chunks = self.normal(step, 8, 6).split(4)
        with torch.no_grad():
            cached = torch.cat([self.model(c) for c in chunks])
        cached.requires_grad_()
        loss = F.cross_entropy(cached @ cached.T / 4, torch.arange(8)) + to_target(cached)
        (gradients,) = torch.autograd.grad(loss, cached)
        for chunk, gradient in zip(chunks, gradients.split(4), strict=True):
            self.model(chunk).backward(gradient)


class TargetNetworksMayLag(Loop):
    """DQN: a target network, copied every third step, and double Q-learning's choice without gradients"""

    dtypes = DOUBLE

    def build(self):
        online = mlp(6, 12, 12, 4)
        return nn.ModuleDict({"online": online, "target": copy.deepcopy(online).requires_grad_(False)})

    def loss(self, step):
        state, following = self.normal(step, 8, 6), self.normal(step + 50, 8, 6)
        with torch.no_grad():
            action = self.model["online"](following).argmax(1, keepdim=True)
            value = 1 + 0.9 * self.model["target"](following).gather(1, action)
        chosen = self.model["online"](state).gather(1, self.whole(step, 4, 8, 1))
        return F.smooth_l1_loss(chosen, value)

    def step(self, step):
        super().step(step)
        if step % 3 == 2:
            self.model["target"].load_state_dict(self.model["online"].state_dict())


class ABaselineMayBeSelfCritical(Loop):
    """Self-critical training: a greedy rollout without gradients is the baseline of a drawn one"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 8, 6)
        with torch.no_grad():
            baseline = self.model(x).max(1).values
        drawn = self.model(x)
        index = torch.multinomial(drawn.detach().float().softmax(1), 1)
        return -((1.5 - baseline[:, None]) * drawn.log_softmax(1).gather(1, index)).mean()


class ABaselineMayNotBeEvaluated(Loop):
    """The same with model.eval() around the greedy rollout"""

    dtypes = ALL

    def loss(self, step):
        x = self.normal(step, 8, 6)
        self.model.eval()
        with torch.no_grad():
            baseline = self.model(x).mean()
        self.model.train()
        return to_target(self.model(x), 1.5) * (1 + baseline.square())


class AttentionMayBeInEvaluationMode(Loop):
    """A transformer's layer in eval mode gives targets without gradients inside the pass, by torch's fast path"""

    dtypes = FULL
    seed = 4

    def build(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.ModuleDict({"layer": layer.eval(), "head": nn.Linear(8, 3)})

    def backward(self, step):
        x = self.normal(step, 4, 5, 8)
        with torch.no_grad():
            target = self.model["layer"](x)
        y = self.model["layer"](x)
        (to_target(self.model["head"](y)) + (y - 0.5 * target).square().mean()).backward()
