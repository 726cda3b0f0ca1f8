"""Layers that a step does not reach: own perturbations, frozen weights, tensor parallelism."""

from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests.distributed import engines, loops, oracle
from tests.distributed.engines import full
from tests.distributed.problem import BALLS, RATE, RHO, Net, built
from tests.distributed.running import Checks

CHECKS: Checks = {2: {}, 4: {}}
STEPS = 5  # the last reaches again what two before it have gone around


def assert_same(model, expected):
    names = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full(parameter), names[name.removeprefix("module.")], rtol=0, atol=1e-6)


def trained(model, backward, process, parameters=None, ball="NuSAM", **options):
    base = torch.optim.SGD(list(model.parameters() if parameters is None else parameters), lr=RATE)
    opt = BALLS[ball][0](base, RHO, model=model, **options)
    for step in range(STEPS):
        for _ in opt.passes():
            backward(model, step, process)
        opt.step()


def own_perturbations(backward, engine, **options):
    expected, size = built(Net), dist.get_world_size()
    oracle.train(expected, backward, oracle.nu_sam, RHO, RATE, STEPS, size, each=True)
    model = loops.wrapped(built(Net), engine, unused=True)
    trained(model, backward, dist.get_rank(), m_sam=True, **options)
    assert_same(model, expected)


PATHS = [("gradient", "weights"), ("gradient", "forward"), ("matrix-free", "forward"), ("matrix-free", "weights")]
OTHERS = (loops.each_process_another_block, loops.one_process_drops_both, loops.all_drop_a_block)
for number, backward in enumerate(OTHERS):
    for ascent, placement in PATHS[number % 2 :: 2]:
        CHECKS[2][f"own perturbations: {backward.__name__} DDP {ascent} {placement}"] = partial(
            own_perturbations, backward, "DDP", ascent=ascent, placement=placement
        )
for backward in (loops.plain, loops.all_drop_a_block, loops.a_block_that_nobody_reaches):
    CHECKS[2][f"own perturbations: {backward.__name__} FSDP2"] = partial(own_perturbations, backward, "FSDP2")


def frozen_blocks(backward, engine, targets, placement):
    """The blocks have no gradient of their own and are perturbed all the same."""
    expected = built(Net)
    frozen = [name for name, _ in expected.named_parameters() if name.startswith("blocks.")]

    def only_frozen(gradients, rho):
        return {name: e for name, e in oracle.nu_sam(gradients, rho).items() if name in frozen}

    epsilons = only_frozen if targets == "frozen" else oracle.nu_sam
    oracle.train(expected, backward, epsilons, RHO, RATE, STEPS, dist.get_world_size(), frozen)
    net = built(Net)
    net.blocks.requires_grad_(False)
    model = loops.wrapped(net, engine, unused=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained(model, backward, dist.get_rank(), trainable, targets=targets, placement=placement)
    assert_same(model, expected)


def every_one(name, parameter):
    return True


for turn, engine in enumerate(("DDP", "FSDP2")):
    of_engine = [loops.plain, loops.fgsm, loops.two_backwards, loops.all_drop_a_block]
    if engine == "DDP":
        of_engine += [loops.each_process_another_block, loops.one_process_drops_both]
    for number, backward in enumerate(of_engine, turn):  # either with each, under the one engine or the other
        targets = every_one if number % 2 else "frozen"
        for placement in ("auto", "weights")[: 2 if number < 4 else 1]:
            name = f"frozen: {backward.__name__} {engine} {getattr(targets, '__name__', targets)} {placement}"
            CHECKS[2][name] = partial(frozen_blocks, backward, engine, targets, placement)


# ------------------------------------------------------------------------------- tensor parallelism


class Skipping(engines.Net):
    """The two layers that are split are gone around in some steps."""

    def forward(self, x, skips=False):
        x = self.first(x)
        return self.last(F.pad(x, (0, 1)) if skips else self.down(torch.tanh(self.up(x))))


def skipping_backward(model, step, process, parts):
    x, y = (t.chunk(parts)[process] for t in engines.sample(step, torch.float64))
    F.cross_entropy(model(x, step in (0, 2, 3)), y).backward()


def split_layers(engine, ball="NuSAM", **options):
    parts, part = engines.shares(engine)
    backward = partial(skipping_backward, parts=parts)
    expected = Skipping(torch.float64)
    oracle.train(expected, backward, BALLS[ball][1], RHO, RATE, STEPS, parts)
    model = engines.ENGINES[engine][1](Skipping(torch.float64))
    trained(model, backward, part, ball=ball, **options)
    assert_same(model, expected)


for size, checks in CHECKS.items():
    of_size = [name for name, (sizes, _) in engines.ENGINES.items() if size in sizes]
    of_size.remove("DDP")  # whose find_unused_parameters has its checks elsewhere
    for number, engine in enumerate(of_size, size // 4):  # FSDP2 takes the one half in two processes, the other in four
        for ascent, placement in PATHS[number % 2 :: 2]:
            checks[f"split layers: {engine} {ascent} {placement}"] = partial(
                split_layers, engine, ascent=ascent, placement=placement
            )
        for ball in ("NuSAMNorm", "SAM") if size == 2 else ("NuSAMNorm", "SAM")[number % 2 :: 2]:
            checks[f"split layers: {engine} {ball}"] = partial(split_layers, engine, ball)
