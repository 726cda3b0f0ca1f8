"""Several forwards or backwards in one pass"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class EveryBackwardOfACriticCounts(Loop):
    """A GAN's critic: one backward for real samples, another for generated ones"""

    dtypes = ALL

    def build(self):
        return mlp(6, 12, 12, 1)

    def backward(self, step):
        F.softplus(-self.model(self.normal(step, 8, 6))).mean().backward()
        F.softplus(self.model(self.normal(step + 50, 8, 6, shift=-0.4))).mean().backward()


class EveryTasksBackwardCounts(Loop):
    """Two tasks on a shared body, each with a forward and a backward of its own"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"body": mlp(6, 12, 12), "a": nn.Linear(12, 8), "b": nn.Linear(12, 3)})

    def backward(self, step):
        x = self.normal(step, 8, 6)
        to_target(self.model["a"](self.model["body"](x).tanh())).backward()
        (0.5 * to_target(self.model["b"](self.model["body"](x + 0.1).tanh()), -1)).backward()


class MicroBatchesInOnePassAddUp(Loop):
    """Micro-batches by hand: four chunks, each with its backward, inside one pass"""

    dtypes = ALL

    def backward(self, step):
        for x in self.normal(step, 8, 6).chunk(4):
            (to_target(self.model(x)) / 4).backward()


class MicroBatchesMayVaryInNumber(Loop):
    """As many backwards as the batch has chunks: one, three, two, and so on"""

    steps = 9

    def backward(self, step):
        for x in self.normal(step, 2 * (1, 3, 2, 1, 1, 4, 1, 2, 1)[step], 6).split(2):
            to_target(self.model(x)).backward()


class ASecondBackwardMayComeLater(Loop):
    """An auxiliary loss with its own backward, switched on in the fourth step"""

    dtypes = ALL

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        if step >= 3:
            to_target(self.model(self.normal(step + 50, 8, 6)), -1).backward()


class ASecondBackwardMayComeOffTheBeat(Loop):
    """An auxiliary loss with its own backward in the sixth and eighth step only"""

    steps = 9

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        if step in (5, 7):
            to_target(self.model(self.normal(step + 50, 4, 6)), -1).backward()


class BothCallsOfASiameseNetCount(Loop):
    """A siamese net: called twice, one backward through both"""

    def loss(self, step):
        a, b = self.model(self.normal(step, 8, 6)), self.model(self.normal(step + 50, 8, 6, shift=-0.5))
        return (1 - F.cosine_similarity(a, b)).mean() + to_target(a) + to_target(b, -1)


class AllThreeCallsOfATripletCount(Loop):
    """A triplet loss: anchor, positive and negative through one net"""

    dtypes = DOUBLE

    def loss(self, step):
        anchor, positive, negative = (self.model(self.normal(step + 50 * k, 8, 6, shift=1 - k)) for k in range(3))
        return F.triplet_margin_loss(anchor, positive, negative, margin=3.0) + 0.1 * to_target(anchor)


class TwoViewsOfContrastiveLearningCount(Loop):
    """SimCLR: two augmented views, a projection head, in-batch negatives"""

    dtypes = DOUBLE

    lr = 0.1

    def build(self):
        return nn.ModuleDict({"net": mlp(6, 12, 12), "head": mlp(12, 12, 4)})

    def loss(self, step):
        x = self.normal(step, 8, 6)
        views = [F.normalize(self.model["head"](self.model["net"](x + 0.3 * self.noise(8, 6)))) for _ in range(2)]
        return F.cross_entropy(views[0] @ views[1].T / 0.5, torch.arange(8))


class AnEmaTeacherIsLeftAlone(Loop):
    """BYOL: a student and an averaged teacher, which sees both views without gradients and moves after the step"""

    def build(self):
        student = mlp(6, 12, 12)
        teacher = copy.deepcopy(student).requires_grad_(False)
        return nn.ModuleDict({"student": student, "teacher": teacher, "predictor": nn.Linear(12, 12)})

    def loss(self, step):
        a, b = self.normal(step, 8, 6), self.normal(step + 50, 8, 6)
        with torch.no_grad():
            targets = self.model["teacher"](b), self.model["teacher"](a)
        found = (self.model["predictor"](self.model["student"](x).tanh()) for x in (a, b))
        return sum(F.mse_loss(y, 2 * t + 1) for y, t in zip(found, targets, strict=True))

    def step(self, step):
        super().step(step)
        with torch.no_grad():
            for t, s in zip(self.model["teacher"].parameters(), self.model["student"].parameters(), strict=True):
                t.lerp_(s, 0.1)


class TwoBackwardsThroughOneGraphCount(Loop):
    """Two losses of one forward, the first backward with retain_graph"""

    dtypes = ALL

    def backward(self, step):
        y = self.model(self.normal(step, 8, 6))
        to_target(y).backward(retain_graph=True)
        (0.3 * y.abs().mean()).backward()


class ActorAndCriticShareABody(Loop):
    """Actor and critic on one body: the policy's backward, then the value's through the same graph"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"body": mlp(6, 12, 12), "actor": nn.Linear(12, 6), "critic": nn.Linear(12, 1)})

    def backward(self, step):
        h = self.model["body"](self.normal(step, 8, 6)).tanh()
        value = self.model["critic"](h).squeeze(1)
        advantage = 2 - value.detach()
        logp = self.model["actor"](h).log_softmax(1)[:, step % 6]
        (-(advantage * logp).mean()).backward(retain_graph=True)
        (value - 2).square().mean().backward()


class FrozenWeightsMayBeCalledTwice(Loop):
    """Adapters on frozen weights that are perturbed, the model called for two batches with a backward each"""

    dtypes = ALL
    frozen = True

    def build(self):
        return _Adapted()

    def backward(self, step):
        to_target(self.model(self.normal(step, 8, 6))).backward()
        to_target(self.model(self.normal(step + 50, 8, 6)), -1).backward()


class FrozenWeightsMayBePairedInOneLoss(Loop):
    """Adapters on frozen weights that are perturbed, both sides of a pair in one loss"""

    dtypes = ALL
    frozen = True

    def build(self):
        return _Adapted()

    def loss(self, step):
        chosen, rejected = self.model(self.normal(step, 8, 6)), self.model(self.normal(step + 50, 8, 6, shift=0))
        return -F.logsigmoid(chosen.mean(1) - rejected.mean(1)).mean()


class _Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 8)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)

    def forward(self, x):
        return self.second((self.first(x) + self.up(self.down(x))).tanh())


class TwoOptimizersTakeTurns(Loop):
    """A whole GAN: two optimizers in turn, the critic frozen while the generator learns"""

    def build(self):
        return nn.ModuleDict({"generator": mlp(4, 12, 6), "critic": mlp(6, 12, 12, 1)})

    def optimizers(self):
        parts = self.model["critic"], self.model["generator"]
        return [(torch.optim.SGD(part.parameters(), lr=self.lr, momentum=0.9), part) for part in parts]

    def step(self, step):
        generator, critic = self.model["generator"], self.model["critic"]
        noise, real = self.normal(step, 8, 4), self.normal(step + 50, 8, 6)

        def of_critic():
            F.softplus(-critic(real)).mean().backward()
            F.softplus(critic(generator(noise).detach())).mean().backward()

        self.drivers[0].passes(of_critic)
        self.drivers[0].update()
        critic.requires_grad_(False)
        self.drivers[1].passes(lambda: F.softplus(-critic(generator(noise))).mean().backward())
        self.drivers[1].update()
        critic.requires_grad_(True)


class APipelineByHandIsOnePass(Loop):
    """Split learning: the graph is cut, and the second backward starts from the first one's input gradient"""

    def build(self):
        return nn.ModuleDict({"front": mlp(6, 12, 12), "back": mlp(12, 12, 3)})

    def backward(self, step):
        for x in self.normal(step, 8, 6).chunk(2):
            sent = self.model["front"](x)
            received = sent.detach().requires_grad_()
            to_target(self.model["back"](received)).backward()
            sent.backward(received.grad)


class LayersMayLearnOneByOne(Loop):
    """Greedy layer-wise learning: every layer has its own loss and backward, and no gradient goes on"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 8)])

    def backward(self, step):
        x = self.normal(step, 8, 6)
        for layer in self.model:
            x = layer(x.detach()).tanh()
            to_target(x).backward()


class AllOfAGanMayBeOnePass(Loop):
    """A whole GAN in one pass from the fourth step on, the critic frozen in between; before, one loss through both"""

    dtypes = DOUBLE

    def build(self):
        return nn.ModuleDict({"generator": mlp(6, 12, 6), "critic": mlp(6, 12, 12, 1)})

    def backward(self, step):
        generator, critic = self.model["generator"], self.model["critic"]
        x = self.normal(step, 8, 6)
        if step < 3:
            to_target(critic(generator(x))).backward()
            return
        critic.requires_grad_(False)
        F.softplus(-critic(generator(x))).mean().backward()
        critic.requires_grad_(True)
        (F.softplus(critic(generator(x).detach())).mean() + F.softplus(-critic(x)).mean()).backward()
