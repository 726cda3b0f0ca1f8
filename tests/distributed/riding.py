"""One pass a step in several processes, of which each cuts its own part of the next batch."""

import shutil
import tempfile
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import nusam
from collectives import Collectives
from tests.distributed import oracle
from tests.distributed.engines import ENGINES, Net, full, sample, shares
from tests.distributed.problem import BALLS
from tests.distributed.running import Checks

STEPS, RATE, RHO, SHARE = 7, 0.2, 0.1, 1 / 4
CHECKS: Checks = {2: {}, 4: {}}
PROCESSES = {"DDP": 2, "FSDP2": 2, "HSDP": 4, "TP": 2, "FSDP+TP": 4}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch_of(step: int, parts: int, part: int, first: int | None = None) -> tuple[Tensor, Tensor]:
    x, y = (t.chunk(parts)[part][:first] for t in sample(step, torch.float64))
    return x, y


def by_hand(parts: int, ball: str, each: bool) -> nn.Module:
    """By one process and singular value decompositions: ε one update old, fresh in the first two steps."""
    model = Net(torch.float64)
    epsilons = BALLS[ball][1]
    groups = [[part] for part in range(parts)] if each else [list(range(parts))]

    def backward(step: int, group: list[int], first: int | None = None) -> oracle.Backward:
        return lambda model, number: loss_of(model, batch_of(step, parts, group[number], first)).backward()

    def ascent(step: int) -> list[oracle.Gradients]:
        count = len(batch_of(step, parts, 0)[1]) // 4
        joint = [oracle.joint_gradients(model, backward(step, group, count), len(group)) for group in groups]
        return [epsilons(gradients, RHO) for gradients in joint]

    waiting = None
    for step in range(STEPS):
        found = waiting or ascent(step)
        waiting = ascent(step + 1) if 0 < step < STEPS - 1 else None
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        total: oracle.Gradients = {}
        for group, epsilon in zip(groups, found, strict=True):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(before[name] + epsilon.get(name, 0))
            gradients = oracle.joint_gradients(model, backward(step, group), len(group))
            for name, gradient in gradients.items():
                total[name] = total.get(name, 0) + gradient / len(groups)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name] - RATE * total[name])
    return model


def equals_the_steps_by_hand(engine: str, ball: str, m_sam: bool = False) -> None:
    parts, part = shares(engine)
    model = ENGINES[engine][1](Net(torch.float64))
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = BALLS[ball][0](base, RHO, model=model, m_sam=m_sam, ascent_share=SHARE)
    batches = [batch_of(step, parts, part) for step in range(STEPS)]
    ride(opt, model, batches)
    assert opt._one_pass is not None
    assert not opt._one_pass._refused
    for p, q in zip(model.parameters(), by_hand(parts, ball, m_sam).parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=1e-8)


for engine, processes in PROCESSES.items():
    for ball in ("NuSAM", "NuSAMNorm"):
        CHECKS[processes][f"one pass {engine} {ball}"] = partial(equals_the_steps_by_hand, engine, ball)
    if "TP" not in engine:
        CHECKS[processes][f"one pass {engine} m-SAM"] = partial(equals_the_steps_by_hand, engine, "NuSAM", m_sam=True)


def says_no_more_than_the_base(engine: str, m_sam: bool) -> None:
    """Gathering and reducing as the base optimizer alone; two sums of all vectors together, or none with m-SAM.

    Matrices that are split in other ways have sums of their own: by rows, by columns, or not at all.
    """
    parts, part = shares(engine)
    batches = [batch_of(step, parts, part) for step in range(STEPS)]
    alone = ENGINES[engine][1](Net(torch.float64))
    for batch in batches[:3]:  # DDP makes its buckets anew in the first
        loss_of(alone, batch).backward()
    with Collectives() as base:
        loss_of(alone, batches[3]).backward()
    model = ENGINES[engine][1](Net(torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = nusam.NuSAM(optimizer, RHO, model=model, m_sam=m_sam, ascent_share=SHARE)
    steps = opt.one_pass(batches, partial(loss_of, model))
    for _ in range(3):
        next(steps)
        opt.step()
    with Collectives() as ours:  # of a step in which nothing is compared
        next(steps)
    for name in ("gather", "scatter"):
        assert ours.bytes(name) == base.bytes(name)
        assert ours.count(name) == base.count(name)
    sums = 6 if engine == "FSDP+TP" else 2
    assert ours.count() == base.count() + (0 if m_sam else sums), (ours.calls, base.calls)
    if "TP" not in engine:  # which sums the vectors of its own matrices alone
        vectors = sum(8 * sum(p.shape) for p in model.parameters() if p.ndim == 2)
        assert ours.bytes() == base.bytes() + (0 if m_sam else vectors), (ours.calls, base.calls)


for engine, processes in PROCESSES.items():
    for m_sam in (False, True) if "TP" not in engine else (False,):
        case = partial(says_no_more_than_the_base, engine, m_sam)
        CHECKS[processes][f"one pass says no more {engine} {m_sam=}"] = case


def ride(opt: nusam.NuSAM, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for _ in opt.one_pass(batches, partial(loss_of, model)):
        opt.step()


def mixed_samples_take_two_passes() -> None:
    """Batch norm: every process falls back, and trains as with two passes."""
    for engine in ("DDP", "FSDP2", "TP"):
        parts, part = shares(engine)
        weights = []
        for rides in (False, True):
            net = Net(torch.float64)
            net.first[1] = nn.BatchNorm1d(5).double().to(next(net.parameters()).device)
            model = ENGINES[engine][1](net)
            base = torch.optim.SGD(model.parameters(), lr=RATE)
            opt = BALLS["NuSAM"][0](base, RHO, model=model, ascent_share=1 / 2, ascent="matrix-free")
            batches = [batch_of(step, parts, part) for step in range(STEPS)]
            if rides:
                with pytest.warns(UserWarning, match="now on every step takes two passes"):
                    ride(opt, model, batches)
            else:
                for batch in batches:
                    for share in opt.passes(batch):
                        loss_of(model, share).backward()
                    opt.step()
            weights.append([full(p).detach().clone() for p in model.parameters()])
        for p, q in zip(*weights, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


CHECKS[2]["one pass with batch norm"] = mixed_samples_take_two_passes


def accumulates_before_it_reduces(engine: str, views: bool = False) -> None:
    """Each process has an ε of its own, and so equals a process that is alone, but for the mean of the gradients."""
    parts, part = shares("DDP")
    batches = [batch_of(step, parts, part) for step in range(2 * STEPS)]
    expected, found = Net(torch.float64), Net(torch.float64)
    model = ENGINES[engine][1](found)
    if engine == "DDP":
        model = nn.parallel.DistributedDataParallel(found, gradient_as_bucket_view=views)
    base = torch.optim.SGD(expected.parameters(), lr=RATE)
    opt = nusam.NuSAM(base, RHO, model=expected, ascent_share=SHARE)
    for step, _ in enumerate(opt.one_pass(batches, partial(loss_of, expected), accumulate=True)):
        if step % 2:
            for parameter in expected.parameters():
                torch.distributed.all_reduce(parameter.grad.div_(parts))
            opt.step()
            opt.zero_grad()
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = nusam.NuSAM(base, RHO, model=model, ascent_share=SHARE, m_sam=True)
    steps = opt.one_pass(batches, partial(loss_of, model), accumulate=True)
    for step in range(len(batches)):
        # under DDP the first of two micro-batches stays in its process
        with model.no_sync() if engine == "DDP" and step % 2 == 0 else nullcontext():
            next(steps)
        if step % 2:
            opt.step()
            opt.zero_grad()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=1e-8)


CHECKS[2]["one pass accumulates under DDP"] = partial(accumulates_before_it_reduces, "DDP")
CHECKS[2]["one pass accumulates under DDP in views"] = partial(accumulates_before_it_reduces, "DDP", views=True)
CHECKS[2]["one pass accumulates under FSDP2"] = partial(accumulates_before_it_reduces, "FSDP2")
CHECKS[4]["one pass accumulates under HSDP"] = partial(accumulates_before_it_reduces, "HSDP")


class Takes(nn.Module):
    """A model that may be given more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(torch.float64)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def processes_agree_on_what_a_batch_can_not_do() -> None:
    """In one process a batch can't travel with the one before it, while all look: all take two passes from then on."""
    parts, part = shares("DDP")
    model = nn.parallel.DistributedDataParallel(Takes())
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=RATE), RHO, model=model, ascent_share=SHARE)
    batches = [(step, batch_of(step, parts, part)) for step in range(STEPS)]

    def loss(batch: tuple[int, tuple[Tensor, Tensor]]) -> Tensor:
        step, (x, y) = batch
        more = {"more": x} if part == 0 and step == 2 else {}
        return nn.functional.cross_entropy(model(x, **more), y)

    carried = []
    with pytest.warns(UserWarning, match="from now on every step takes two passes"):
        carried += [opt._waiting or opt.step() for _ in opt.one_pass(batches, loss)]
    assert carried == [None] * STEPS


CHECKS[2]["one pass agrees among processes"] = processes_agree_on_what_a_batch_can_not_do


def goes_on_from_a_checkpoint(engine: str) -> None:
    """torch.distributed.checkpoint fills what is there: an ε that waits has its place before any does."""
    parts, part = shares(engine)
    batches = [batch_of(step, parts, part) for step in range(STEPS)]

    def made() -> tuple[nn.Module, nusam.NuSAM]:
        model = ENGINES[engine][1](Net(torch.float64))
        base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        return model, nusam.NuSAM(base, RHO, model=model, ascent_share=SHARE)

    straight, opt = made()
    folder = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    for step, _ in enumerate(opt.one_pass(batches, partial(loss_of, straight))):
        opt.step()
        if step == 3:
            weights, state = get_state_dict(straight, opt)
            dcp.save({"model": weights, "opt": state}, checkpoint_id=folder[0])
    second, opt = made()
    opt._begin_one_pass()  # as frameworks do before they load
    weights, state = get_state_dict(second, opt)
    dcp.load({"model": weights, "opt": state}, checkpoint_id=folder[0])
    set_state_dict(second, opt, model_state_dict=weights, optim_state_dict=state)
    assert opt._waiting
    ride(opt, second, batches[4:])
    for p, q in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(full(p), full(q))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder[0])


for engine, processes in PROCESSES.items():
    CHECKS[processes][f"one pass goes on from a checkpoint: {engine}"] = partial(goes_on_from_a_checkpoint, engine)
