"""Activations that are computed again"""

from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _Checkpointed(Loop):
    def build(self):
        return nn.ModuleDict(
            {"stem": nn.Conv1d(6, 12, 1), "a": mlp(12, 16, 12), "b": mlp(12, 16, 12), "out": nn.Linear(12, 8)}
        )

    reentrant = False
    drop = 0.0

    def run(self, name, h):
        return h + F.dropout(self.model[name](h), self.drop)

    def loss(self, step):
        h = self.model["stem"](self.normal(step, 6, 8)).T
        for name in "ab":
            h = checkpoint(self.run, name, h, use_reentrant=self.reentrant)
        return to_target(self.model["out"](h))


class ActivationsMayBeRecomputed(_Checkpointed):
    """Checkpoints behind a convolution, not re-entrant, with dropout"""

    dtypes = DOUBLE

    drop = 0.3


class ReentrantCheckpointsMayFollowAStem(_Checkpointed):
    """Re-entrant checkpoints behind a convolution, with dropout: as in most vision transformers"""

    dtypes = ALL
    reentrant = True
    drop = 0.3


class CheckpointsMayComeLater(_Checkpointed):
    """Checkpoints that are switched on in the fourth step"""

    dtypes = DOUBLE

    def loss(self, step):
        h = self.model["stem"](self.normal(step, 6, 8)).T
        for name in "ab":
            h = checkpoint(self.run, name, h, use_reentrant=True) if step >= 3 else self.run(name, h)
        return to_target(self.model["out"](h))


class _Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 12, 12, 8)

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=True)


class AnOnlyChildMayBeCheckpointed(Loop):
    """A re-entrant checkpoint around the only child, whose first forward is without gradients"""

    dtypes = ALL

    def build(self):
        return _Wrapper()

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6).requires_grad_()))


class CheckpointsMayNest(Loop):
    """Checkpoints within a checkpoint, re-entrant outside"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"input": nn.Linear(6, 12), "a": mlp(12, 16, 12), "b": mlp(12, 16, 12)})

    def loss(self, step):
        def both(h):
            return self.model["b"](checkpoint(self.model["a"], h, use_reentrant=False).tanh())

        return to_target(checkpoint(both, self.model["input"](self.normal(step, 8, 6)), use_reentrant=True))


class SegmentsMayBeCheckpointed(Loop):
    """checkpoint_sequential over a whole net"""

    dtypes = DOUBLE

    def build(self):
        return mlp(6, 12, 12, 12, 8)

    def loss(self, step):
        x = self.normal(step, 8, 6).requires_grad_()
        return to_target(checkpoint_sequential(self.model, 3, x, use_reentrant=step % 2 == 1))
