"""Training steps of the wild in several processes, each against one process that perturbs by an SVD."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import oracle
from tests.distributed.engines import full
from tests.distributed.problem import BALLS, RATE, RHO, STEPS, Net, built, sample
from tests.distributed.running import Checks

CHECKS: Checks = {2: {}}


class PerSample(Net):
    """A block goes over the samples by vmap."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(self.norm(x + torch.vmap(self.blocks[0])(x)))


class Tied(nn.Module):
    """One matrix at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.outer = nn.Linear(7, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.body(x @ self.outer.weight)))


# ------------------------------------------------------------------------------- one pass of a process


def plain(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x), y).backward()


def each_process_another_block(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, ((step + process) % 2,)), y).backward()


def all_drop_a_block(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, (0,) if step % 3 else (1,)), y).backward()


def one_process_drops_both(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, () if (step + process) % 2 else (0, 1)), y).backward()


def a_block_that_nobody_reaches(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, (1,)), y).backward()


def one_process_uses_a_block_twice(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, (0, 1, 1) if process else (0, 1)), y).backward()


def fgsm(model, step, process):
    x, y = sample(step, process)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(z), y), z)
    F.cross_entropy(model(x + 0.3 * g.sign()), y).backward()


def pgd_beside_clean(model, step, process):
    x, y = sample(step, process)
    z = x + 0.05
    for _ in range(3):
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(z), y), z)
        z = z + 0.1 * g.sign()
    (F.cross_entropy(model(z.detach()), y) + F.cross_entropy(model(x), y)).backward()


def attack_by_backward(model, step, process):
    """The attack's own backward leaves gradients in the weights too, as many scripts have it."""
    x, y = sample(step, process)
    z = x.clone().requires_grad_()
    F.cross_entropy(model(z), y).backward()
    model.zero_grad()
    F.cross_entropy(model(x + 0.3 * z.grad.sign()), y).backward()


def gradient_penalty(model, step, process):
    x, y = sample(step, process)
    x = x.requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (F.cross_entropy(out, y) + 0.01 * g.square().sum(1).mean()).backward()


def two_backwards(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x), y).backward()
    (0.5 * model(x + 1).square().mean()).backward()


def micro_batches(model, step, process):
    x, y = sample(step, process)
    for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
        (F.cross_entropy(model(a), b) / 3).backward()


def outside_its_layer(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, by_hand=True), y).backward()


def outside_its_layer_in_one_process(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, by_hand=process == 1), y).backward()


def outside_its_layer_now_and_then(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, by_hand=step % 2 == 1), y).backward()


def weight_penalty(model, step, process):
    x, y = sample(step, process)
    weights = [full(p) for name, p in model.named_parameters() if name.endswith("head.weight")]
    (F.cross_entropy(model(x), y) + 0.1 * sum(w.square().sum() for w in weights)).backward()


def targets_without_gradients(model, step, process):
    x, y = sample(step, process)
    with torch.no_grad():
        soft = model(x + 0.5).softmax(1)
    out = model(x)
    (F.cross_entropy(out, y) + F.cross_entropy(out, soft)).backward()


def nothing_in_one_process(model, step, process):
    """A process whose batch has no labels: its loss is zero times what the model says."""
    x, y = sample(step, process)
    (F.cross_entropy(model(x), y) * float((step + process) % 2)).backward()


class Loop(NamedTuple):
    backward: Callable[[nn.Module, int, int], None]
    build: Callable[[], nn.Module] = Net
    unused: bool = False  # parameters without a gradient in some process
    engines: tuple[str, ...] = ("DDP", "FSDP2")


LOOPS = [
    Loop(plain),
    Loop(plain, PerSample, unused=True),
    Loop(plain, Tied),
    Loop(each_process_another_block, unused=True, engines=("DDP", "FSDP2 unused")),
    Loop(one_process_drops_both, unused=True, engines=("DDP", "FSDP2 unused")),
    Loop(all_drop_a_block, unused=True, engines=("DDP", "FSDP2", "FSDP2 unused")),
    Loop(a_block_that_nobody_reaches, unused=True, engines=("DDP", "FSDP2", "FSDP2 unused")),
    Loop(one_process_uses_a_block_twice, engines=("DDP", "FSDP2 whole")),
    Loop(fgsm),
    Loop(pgd_beside_clean),
    Loop(attack_by_backward, engines=("DDP",)),
    Loop(gradient_penalty, engines=("DDP", "FSDP2 gathered")),  # else FSDP2 has let go of what is differentiated again
    Loop(two_backwards),
    Loop(micro_batches),
    Loop(outside_its_layer),
    Loop(outside_its_layer_in_one_process),
    Loop(outside_its_layer_now_and_then),
    Loop(weight_penalty),
    Loop(targets_without_gradients),
    Loop(nothing_in_one_process),
]


# ------------------------------------------------------------------------------- in several processes


def wrapped(model: nn.Module, engine: str, unused: bool) -> nn.Module:
    if engine == "DDP":
        return DistributedDataParallel(model, find_unused_parameters=unused)
    for block in getattr(model, "blocks", ()) if engine == "FSDP2" else ():
        fully_shard(block)
    fully_shard(model)
    if engine == "FSDP2 unused":
        model.set_reduce_scatter_unused_params(True)
    elif engine == "FSDP2 gathered":
        model.set_reshard_after_backward(False)
    return model


@cache
def expected(loop: Loop, ball: str) -> dict[str, Tensor]:
    model = built(loop.build)
    oracle.train(model, loop.backward, BALLS[ball][1], RHO, RATE, STEPS, dist.get_world_size())
    return dict(model.named_parameters())


def equals_one_process(loop: Loop, engine: str, ball: str, **options):
    """Every weight, after some steps; or the sentence by which every process refuses."""
    try:
        return train(loop, engine, ball, **options)
    except RuntimeError as error:
        if options.get("placement") != "forward" or "an ε in the forward can't reach it" not in str(error):
            raise
        return str(error)


def train(loop: Loop, engine: str, ball: str, **options):
    model = wrapped(built(loop.build), engine, loop.unused)
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = BALLS[ball][0](base, RHO, model=model, **options)
    for step in range(STEPS):
        for _ in opt.passes():
            loop.backward(model, step, dist.get_rank())
        opt.step()
        if engine == "FSDP2 gathered":
            model.reshard()  # the loop's own duty
    names = dict(expected(loop, ball))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full(parameter), names[name.removeprefix("module.")], rtol=0, atol=1e-6)


WAYS = {
    "matrix-free weights": ("NuSAM", {"ascent": "matrix-free"}),
    "matrix-free forward": ("NuSAM", {"ascent": "matrix-free", "placement": "forward"}),
    "SAM": ("SAM", {}),  # and for νSAM by gradients
}
for number, loop in enumerate(LOOPS):
    for turn, engine in enumerate(loop.engines, number):
        for way, (ball, options) in [way for i, way in enumerate(WAYS.items()) if (i + turn) % 3]:
            name = f"{loop.backward.__name__} {loop.build.__name__} {engine} {way}"
            CHECKS[2][f"loop: {name}"] = partial(equals_one_process, loop, engine, ball, **options)
