"""What a forward and a backward run in"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.loops.loop import ALL, DOUBLE, FULL, Loop, to_target


class _Surrounded(Loop):
    dtypes = DOUBLE

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class AStepMayRunInAThread(_Surrounded):
    """Forward and backward in a worker's thread"""

    def backward(self, step):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().backward, step).result()


class BackwardsMayRunInTwoThreads(_Surrounded):
    """Two losses, whose backwards run in two threads"""

    def backward(self, step):
        losses = [self.loss(step), self.loss(step + 50)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(torch.Tensor.backward, losses))


class SavedTensorsMayBeKeptElsewhere(_Surrounded):
    """save_on_cpu around the forward"""

    def loss(self, step):
        with torch.autograd.graph.save_on_cpu():
            return super().loss(step)


class OperationsMayBeCounted(_Surrounded):
    """FlopCounterMode around a pass"""

    def backward(self, step):
        with FlopCounterMode(display=False):
            super().backward(step)


class AFunctionMayBeAnother(_Surrounded):
    """A TorchFunctionMode that scales what F.linear returns"""

    def loss(self, step):
        with _Scaled():
            return super().loss(step)


class AFunctionMayBeAnotherMidway(_Surrounded):
    """A TorchFunctionMode scales what F.linear returns, from the fourth step on"""

    def loss(self, step):
        if step < 3:
            return super().loss(step)
        with _Scaled():
            return super().loss(step)


class _Scaled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return 1.3 * found if function is F.linear else found


class AFunctionMayLean(_Surrounded):
    """A TorchFunctionMode that changes F.linear and F.embedding column by column"""

    dtypes = ALL
    begins = 0

    def build(self):
        return nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 4))

    def loss(self, step):
        with _Leaning() if step >= self.begins else nullcontext():
            return to_target(self.model(self.whole(step, 10, 8)))


class AFunctionMayLeanMidway(AFunctionMayLean):
    """The same mode, from the fourth step on"""

    dtypes = DOUBLE
    begins = 3


class _Leaning(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function not in (F.linear, F.embedding):
            return found
        return found * torch.linspace(0.5, 1.5, found.shape[-1], dtype=found.dtype)


class AFunctionMayBeWatched(_Surrounded):
    """A TorchFunctionMode that changes nothing, and torch.device, which is one too"""

    dtypes = ALL

    def loss(self, step):
        with _Harmless(), torch.device("cpu"):
            return super().loss(step)


class _Harmless(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class ADeviceMayBeSet(_Surrounded):
    """torch.device as a context"""

    def loss(self, step):
        with torch.device("cpu"):
            return super().loss(step)


class AStepMayRunWithoutGradients(_Surrounded):
    """A step in torch.no_grad(), whose passes switch gradients on"""

    def step(self, step):
        with torch.no_grad():
            super().step(step)

    def backward(self, step):
        with torch.enable_grad():
            super().backward(step)


class AnEvaluationMayBeACall(_Surrounded):
    """A call in inference mode inside each pass"""

    def loss(self, step):
        with torch.inference_mode():
            target = float(self.model(self.normal(step, 8, 6)).mean())
        return to_target(self.model(self.normal(step, 8, 6)), 1.5 + target)


class ACompiledLoopMayGetASecondBackwardMidway(_Surrounded):
    """torch.compile(fullgraph=True), with a second backward from the fourth step on"""

    slow = True

    def prepare(self):
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model, backend="eager", fullgraph=True)

    def backward(self, step):
        to_target(self.compiled(self.normal(step, 8, 6))).backward()
        if step >= 3:
            to_target(self.compiled(self.normal(step + 50, 8, 6)), -1).backward()


class ACompiledLoopInHalvesMayGetASecondBackward(ACompiledLoopMayGetASecondBackwardMidway):
    """A compiled model has a second backward from the fourth step on, with opt.ascent() and opt.descent()"""

    halves = True

    def step(self, step):
        self.driver.halves(lambda: self.backward(step))
        self.driver.update()


class ACompiledFrozenLayerMayGetASecondBackward(ACompiledLoopMayGetASecondBackwardMidway):
    """A compiled model whose frozen layer is perturbed has a second backward from the fourth step on"""

    frozen = True

    def build(self):
        model = super().build()
        model[2].requires_grad_(False)
        return model


class AModelMayBeCompiledMidway(_Surrounded):
    """torch.compile(fullgraph=True), from the fourth step on"""

    slow = True

    def prepare(self):
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model, backend="aot_eager", fullgraph=True)

    def loss(self, step):
        model = self.compiled if step >= 3 else self.model
        return to_target(model(self.normal(step, 8, 6)))


class WeightsOfACompiledModelMayBeRead(ACompiledLoopMayGetASecondBackwardMidway):
    """torch.compile(fullgraph=True), and a weight that is read outside of the graph"""

    def backward(self, step):
        y = self.compiled(self.normal(step, 8, 6))
        to_target(y * self.model[2].weight.detach().norm()).backward()


class WeightsMayBeReadBetweenTwoGraphs(_Surrounded):
    """Two compiled halves, and between them and in the loss eager code that reads their weights"""

    dtypes = FULL
    slow = True

    def prepare(self):
        torch._dynamo.reset()
        self.halves = [torch.compile(half, backend="aot_eager") for half in (self.model[:2], self.model[2:])]

    def loss(self, step):
        first, second = self.halves
        hidden = first(self.normal(step, 8, 6))
        hidden = hidden / (1 + self.model[0].weight.detach().square().mean())
        return to_target(second(hidden) * self.model[2].weight.data.abs().max())
