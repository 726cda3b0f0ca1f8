"""Loops that change on the way, and what surrounds a step"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, FULL, Loop, mlp, to_target


class _Plain(Loop):
    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class LayersMayBeFrozenMidway(_Plain):
    """A layer is frozen in the fourth step"""

    def step(self, step):
        if step == 3:
            self.model[2].requires_grad_(False)
            for p in self.model[2].parameters():
                p.grad = None
        super().step(step)


class LayersMayBeThawedMidway(_Plain):
    """Gradual unfreezing: layers are frozen at first, and thawed in the third and fifth step"""

    dtypes = ALL

    def prepare(self):
        self.all = list(self.model.parameters())
        self.model[:4].requires_grad_(False)

    def base(self):
        return torch.optim.SGD(self.all, lr=self.lr, momentum=0.9)

    def step(self, step):
        if step in (2, 4):
            self.model[4 - step].requires_grad_(True)
        super().step(step)


class GroupsMayJoinMidway(_Plain):
    """add_param_group in the fourth step, with a radius of its own"""

    def base(self):
        return torch.optim.SGD(self.model[:4].parameters(), lr=self.lr, momentum=0.9)

    def step(self, step):
        if step == 3:
            self.driver.add_param_group({"params": list(self.model[4].parameters()), "rho": 0.1})
        super().step(step)


class NetsMayGrow(_Plain):
    """A block joins the model and the optimizer in the fifth step"""

    dtypes = ALL

    def step(self, step):
        if step == 4:
            torch.default_generator.manual_seed(7)
            block = mlp(12, 16, 12).to(torch.bfloat16).to(self.dtype)
            self.model.insert(4, block)
            self.driver.add_param_group({"params": list(block.parameters())})
        super().step(step)


class ModesMayChange(Loop):
    """Batch norm and dropout, in evaluation mode from the fourth step on, as late fine-tuning does"""

    dtypes = ALL

    def build(self):
        layers = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.3), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(12, 8))

    def loss(self, step):
        self.model.train(step < 3)
        return to_target(self.model(self.normal(step, 8, 6)))


class ValidationMayComeBetweenSteps(Loop):
    """Evaluation, a checkpoint and a deep copy between steps"""

    dtypes = DOUBLE

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))

    def step(self, step):
        super().step(step)
        self.model.eval()
        with torch.no_grad():
            self.model(self.normal(step + 50, 4, 6))
        self.model.train()
        copy.deepcopy(self.model).load_state_dict(self.model.state_dict())


class BatchesMayChangeTheirShape(Loop):
    """A short last batch, and sequences of several lengths"""

    def loss(self, step):
        shape = ((8, 6), (8, 6), (3, 6), (8, 6), (2, 4, 6), (1, 6), (2, 3, 2, 6))[step]
        return to_target(self.model(self.normal(step, *shape)))


class AutocastMaySurroundTheForward(Loop):
    """bfloat16 autocast around the forward and the loss"""

    dtypes = (torch.bfloat16,)
    weights = torch.float32

    def prepare(self):
        self.autocast = self.dtype == torch.bfloat16
        self.dtype = torch.float32 if self.autocast else self.dtype
        self.model.to(self.dtype)

    def loss(self, step):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return to_target(self.model(self.normal(step, 8, 6)).float())


class ScalersMayScale(_Plain):
    """A GradScaler, which scales every backward and steps once"""

    dtypes = (torch.float32, torch.float64)

    def prepare(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(self, step):
        self.driver.passes(lambda: self.scaler.scale(self.loss(step)).backward())
        self.driver.update(self.scaler)


class RunsMayBeResumed(_Plain):
    """The optimizer is saved and loaded into a new one in the fourth step, from which on a backward is added"""

    def step(self, step):
        if step == 3:
            self.driver.resume(self.base())
        super().step(step)

    def backward(self, step):
        super().backward(step)
        if step >= 4:
            to_target(self.model(self.normal(step + 50, 4, 6)), -1).backward()


class WeightsMayBeWrittenMidway(_Plain):
    """Weights are reset, and loaded, between steps"""

    def step(self, step):
        with torch.no_grad():
            if step == 2:
                self.model[2].weight.mul_(0.5)
            if step == 4:
                state = {name: value.clone() for name, value in self.model.state_dict().items()}
                self.model.load_state_dict({name: 0.9 * value for name, value in state.items()})
        super().step(step)


class WeightsMayBeTiedMidway(_Plain):
    """A layer takes another's weight in the fourth step"""

    dtypes = ALL

    def build(self):
        return mlp(6, 12, 12, 12, 3)

    def step(self, step):
        if step == 3:
            self.model[4].weight = self.model[2].weight
        super().step(step)


class AParameterMayBeReplacedMidway(_Plain):
    """A layer's weight is another parameter from the fourth step on, in the optimizer's group too"""

    dtypes = DOUBLE

    def step(self, step):
        if step == 3:
            old = self.model[2].weight
            self.model[2].weight = new = nn.Parameter(0.7 * old.detach())
            for group in self.driver.base.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
        super().step(step)


class AGroupMayBeLeftAlone(_Plain):
    """A group with rho=0 beside one that is perturbed"""

    dtypes = DOUBLE

    def base(self):
        groups = [{"params": self.model[:4].parameters()}, {"params": self.model[4:].parameters(), "rho": 0.0}]
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


class LearningRatesAndRadiiMayBeScheduled(_Plain):
    """A scheduler on the optimizer, and gradients clipped by their norm"""

    dtypes = DOUBLE

    def step(self, step):
        self.driver.passes(lambda: self.backward(step))
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        for group in self.driver.base.param_groups:
            group["lr"] = self.lr / (1 + step)
            group["rho"] = self.rho / (1 + 0.2 * step)
        self.driver.update()


class ABatchMayOverflow(Loop):
    """A batch with an infinite gradient, whose step the loop leaves out"""

    dtypes = DOUBLE

    def step(self, step):
        self.driver.passes(lambda: self.backward(step))
        if all(p.grad.isfinite().all() for p in self.model.parameters()):
            self.driver.update()

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6))) * (float("inf") if step in (2, 5) else 1.0)


class WideLayersAreServedByDefault(Loop):
    """Layers of 256 units, which the default serves, with a critic's second backward from the fourth step on"""

    dtypes = FULL
    worth_serving = None

    def build(self):
        return mlp(6, 256, 256, 3)

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        if step >= 3:
            F.softplus(self.model(self.normal(step + 50, 8, 6))).mean().backward()
