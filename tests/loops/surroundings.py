"""What a forward and a backward run in"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.loops.loop import DOUBLE, Loop, to_target


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
