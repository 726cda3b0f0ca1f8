"""Processes with different numbers of batches, under ``DDP.join()``."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed import oracle
from tests.distributed.problem import BALLS, RATE, RHO, Net, built, sample
from tests.distributed.running import Checks, check

CHECKS: Checks = {2: {}}

EPOCHS = [(2, 4), (5, 1), (0, 2)]  # batches of each process


def batches():
    """Of every step its number, its epoch, and which processes still have a batch."""
    step = 0
    for epoch, counts in enumerate(EPOCHS):
        for index in range(max(counts)):
            yield step, epoch, [index < count for count in counts]
            step += 1


def loss_of(model, step, process):
    x, y = sample(step, process)
    return F.cross_entropy(model(x, ((step + process) % 2,)), y)


def trained(model, opt, process):
    """Every epoch in a context of its own, and some even steps after the last."""
    last = 0
    for epoch in range(len(EPOCHS)):
        with model.join():
            for step, of, there in batches():
                last = step
                if of == epoch and there[process]:
                    for _ in opt.passes():
                        loss_of(model, step, process).backward()
                    opt.step()
    for step in (last + 1, last + 2):
        for _ in opt.passes():
            loss_of(model, step, process).backward()
        opt.step()


def assert_same_bits(model):
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)


def equals_one_process(ball, hook=None, **options):
    presence = {step: there for step, _, there in batches()}
    steps = len(presence) + 2

    def backward(model, step, process):
        if presence.get(step, (True, True))[process]:
            loss_of(model, step, process).backward()

    alone = built(Net)
    oracle.train(alone, backward, BALLS[ball][1], RHO, RATE, steps, 2)
    model = DistributedDataParallel(built(Net), find_unused_parameters=True)
    if hook is not None:
        model.register_comm_hook(None, hook)
    opt = BALLS[ball][0](torch.optim.SGD(model.parameters(), lr=RATE), RHO, model=model, **options)
    trained(model, opt, dist.get_rank())
    assert_same_bits(model)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


for ball, ascent, placement in (
    *product(("NuSAM",), ("gradient", "matrix-free"), ("weights", "forward")),
    ("NuSAMNorm", "matrix-free", "weights"),
    ("SAM", "auto", "weights"),
):
    CHECKS[2][f"uneven: {ball} {ascent} {placement}"] = partial(
        equals_one_process, ball, ascent=ascent, placement=placement
    )
CHECKS[2]["uneven: a hook of torch's without a state"] = partial(
    equals_one_process, "NuSAM", hook=default_hooks.allreduce_hook
)


@check(2, among=CHECKS)
def uneven_with_one_power_iteration_leaves_the_same_bits():
    """A process that was through earlier remembers an older u; all start anew in the next epoch."""
    for method, m_sam in product((nusam.NuSAM, nusam.SAM), (False, True)):
        net = nn.Sequential(built(Net), nn.BatchNorm1d(3)).float()  # with buffers, which DDP broadcasts
        model = DistributedDataParallel(net, find_unused_parameters=True)
        opt = method(torch.optim.SGD(model.parameters(), lr=RATE), RHO, model=model, m_sam=m_sam)
        for epoch in range(len(EPOCHS)):
            with model.join():
                for step, of, there in batches():
                    if of == epoch and there[dist.get_rank()]:
                        x, y = sample(step, dist.get_rank())
                        for _ in opt.passes():
                            F.cross_entropy(model(x.float()), y).backward()
                        opt.step()
            assert_same_bits(model)


@check(2, among=CHECKS)
def uneven_what_join_can_not_have_is_refused():
    group = dist.new_group([0, 1])
    frozen = built(Net)
    for parameter in frozen.blocks.parameters():
        parameter.requires_grad_(False)
    state = powerSGD_hook.PowerSGDState(None)
    for build, hook, options, words in (
        (built(Net), None, {"m_sam": group}, "m_sam needs an ascent that reduces no gradient, but in DDP.join()"),
        (frozen, None, {"targets": "frozen"}, "is frozen and needs a matrix-free ascent, but in DDP.join()"),
        (built(Net), (state, powerSGD_hook.powerSGD_hook), {}, "hook of DistributedDataParallel may have a state"),
        (built(Net), None, {"delay": 1}, "delay counts steps, of which DDP.join"),
        (built(Net), None, {"rho_schedule": lambda k: 1.0}, "rho_schedule counts steps, of which DDP.join"),
    ):
        model = DistributedDataParallel(build)
        if hook is not None:
            model.register_comm_hook(*hook)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        opt = nusam.NuSAM(torch.optim.SGD(trainable, lr=RATE), RHO, model=model, **options)
        with pytest.raises(RuntimeError, match=words), model.join():
            for _ in opt.passes():
                model(sample(0, 0)[0]).square().mean().backward()
        assert all(map(torch.equal, before, model.parameters()))
        assert all(parameter.grad is None for parameter in model.parameters())
