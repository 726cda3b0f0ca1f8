"""What stands around the parameters in several processes: FSDP1, pipelines, several DDPs."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed import oracle
from tests.distributed.engines import DEVICE, full
from tests.distributed.problem import ITERATIONS, RATE, RHO, Net, built, sample
from tests.distributed.running import Checks, check

CHECKS: Checks = {2: {}, 4: {}}

METHODS = (nusam.NuSAM, nusam.NuSAMNorm, nusam.SAM, nusam.SAMON, nusam.GaussSAM)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


# ------------------------------------------------------------------------------- FSDP1


def flattened(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device(DEVICE), **options)


@check(2, among=CHECKS)
def fsdp1_is_refused_when_the_optimizer_is_built():
    for method in METHODS:
        for original in (True, False):
            plain = built(Net)
            inner = nn.Sequential(plain) if method is nusam.SAMON else plain
            model = flattened(inner, use_orig_params=original)
            for shown in (model, inner) if method is nusam.SAMON else (model, inner, None):
                with pytest.raises(NotImplementedError, match=r"use fully_shard \(FSDP2\)"):
                    method(sgd(model), RHO, model=shown)


@check(2, among=CHECKS)
def fsdp1_in_a_part_of_the_model_is_refused():
    model = built(Net)
    model.blocks[0] = flattened(model.blocks[0], use_orig_params=True)
    for parameters in (model.parameters(), model.head.parameters()):
        with pytest.raises(NotImplementedError, match=r"use fully_shard \(FSDP2\)"):
            nusam.NuSAM(torch.optim.SGD(parameters, lr=RATE), RHO, model=model)


@check(2, among=CHECKS)
def fsdp1_is_refused_in_the_first_pass_when_it_wraps_later():
    for method in METHODS:
        model = built(Net)
        opt = method(sgd(model), RHO, model=model)
        wrapped = flattened(model, use_orig_params=True)
        with pytest.raises(NotImplementedError, match=r"use fully_shard \(FSDP2\)"):
            next(iter(opt.passes()))
        assert all(parameter.grad is None for parameter in wrapped.parameters())


@check(2, among=CHECKS)
def fsdp2_that_reduces_unused_parameters_has_no_m_sam():
    model = fully_shard(built(Net))
    opt = nusam.NuSAM(sgd(model), RHO, model=model, m_sam=True)
    model.set_reduce_scatter_unused_params(True)
    with pytest.raises(RuntimeError, match="m_sam needs an ascent that reduces no gradient, but fully_shard with"):
        next(iter(opt.passes()))
    with pytest.raises(ValueError, match="m_sam needs an ascent that reduces no gradient, but fully_shard with"):
        nusam.NuSAM(sgd(model), RHO, model=model, m_sam=True)


# ------------------------------------------------------------------------------- pipelines


class Whole(nn.Module):
    """Four stages; the second begins with an activation, as cuts through a block do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9)),
                nn.Sequential(nn.Tanh(), nn.Linear(9, 7)),
                nn.Sequential(nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 8)),
                nn.Sequential(nn.Tanh(), nn.Linear(8, 3)),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def whole_backward(model, step, process):
    x, y = sample(step, 0)
    F.cross_entropy(model(x), y).backward()


def replica_backward(model, step, replica):
    x, y = sample(step, replica)
    F.cross_entropy(model(x), y).backward()


def modules_of(whole, process, interleaved):
    """The stages of this process: two that follow each other as one, or every second."""
    if interleaved:
        return [whole.stages[process], whole.stages[process + 2]]
    return [nn.Sequential(whole.stages[2 * process], whole.stages[2 * process + 1])]


def third(output, target):
    return F.cross_entropy(output, target) / 3


def pipeline(kind, modules, scales=True):
    process, count = dist.get_rank(), dist.get_world_size()
    stages = [
        PipelineStage(module, process + count * i, count * len(modules), torch.device(DEVICE))
        for i, module in enumerate(modules)
    ]
    of_stages = stages if kind is ScheduleInterleaved1F1B else stages[0]
    return kind(of_stages, n_microbatches=3, loss_fn=F.cross_entropy if scales else third, scale_grads=scales)


def equals_one_process(kind, show, **options):
    """Every micro-batch has a backward of its own in one pass; u and v are those of the whole batch all the same."""
    expected = built(Whole)
    oracle.train(expected, whole_backward, oracle.nu_sam, RHO, RATE, 5, 1)
    interleaved = kind is ScheduleInterleaved1F1B
    modules = modules_of(built(Whole), dist.get_rank(), interleaved)
    mine = nn.ModuleList(modules)
    opt = nusam.NuSAM(sgd(mine), RHO, power_iterations=ITERATIONS, model=mine if show else None, **options)
    # the layers don't see it when gradients are scaled afterwards, and are not trusted then
    schedule = pipeline(kind, modules, scales=options.get("placement") != "forward")
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(5):
        x, y = sample(step, 0)
        for _ in opt.passes():
            arguments = (x,) if dist.get_rank() == 0 else ()
            schedule.step(*arguments, **({"target": y, "losses": []} if last else {}))
        opt.step()
    theirs = nn.ModuleList(modules_of(expected, dist.get_rank(), interleaved))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


WAYS = (
    ("without model=", False, {}),
    ("gradient weights", True, {"ascent": "gradient"}),
    ("matrix-free weights", True, {"ascent": "matrix-free"}),
    ("matrix-free forward", True, {"ascent": "matrix-free", "placement": "forward"}),
    ("gradient forward", True, {"ascent": "gradient", "placement": "forward"}),
)
for number, kind in enumerate((ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B)):
    for way, show, options in (WAYS + WAYS)[2 * number : 2 * number + 3]:
        CHECKS[2][f"pipeline: {kind.__name__} {way}"] = partial(equals_one_process, kind, show, **options)


def perturbation_equals_one_process(kind):
    """A schedule scales the gradients of each stage when that is through, and others' backwards are still to come."""
    expected = built(Whole)
    oracle.train(expected, whole_backward, oracle.nu_sam, RHO, RATE, 5, 1)
    interleaved = kind is ScheduleInterleaved1F1B
    modules = modules_of(built(Whole), dist.get_rank(), interleaved)
    mine = nn.ModuleList(modules)
    opt, perturbation = sgd(mine), nusam.Perturbation(mine, RHO, power_iterations=ITERATIONS)
    schedule = pipeline(kind, modules)
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(5):
        x, y = sample(step, 0)
        opt.zero_grad()
        for _ in perturbation.passes():
            arguments = (x,) if dist.get_rank() == 0 else ()
            schedule.step(*arguments, **({"target": y, "losses": []} if last else {}))
        opt.step()
    theirs = nn.ModuleList(modules_of(expected, dist.get_rank(), interleaved))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


for kind in (ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B):
    CHECKS[2][f"pipeline: {kind.__name__} perturbation"] = partial(perturbation_equals_one_process, kind)


@check(2, among=CHECKS)
def an_epsilon_in_the_forward_of_a_stage_needs_unscaled_gradients():
    (module,) = modules_of(built(Whole), dist.get_rank(), False)
    opt = nusam.NuSAM(sgd(module), RHO, model=module, ascent="matrix-free", placement="forward")
    schedule = pipeline(ScheduleGPipe, [module])
    x, y = sample(0, 0)
    arguments, targets = ((), {"target": y, "losses": []}) if dist.get_rank() else ((x,), {})
    with pytest.raises(RuntimeError, match="or scaled by its pipeline, whose schedule then needs scale_grads=False"):
        for _ in opt.passes():
            schedule.step(*arguments, **targets)


def equals_one_process_with_replicas(engine, kind, **options):
    """Two stages in two replicas each: ranks 0 and 1 hold the first, 2 and 3 the second; each replica has a batch."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("stage", "replica"))
    stage, replica = mesh["stage"].get_local_rank(), mesh["replica"].get_local_rank()
    expected = built(Whole)
    oracle.train(expected, replica_backward, oracle.nu_sam, RHO, RATE, 5, 2)
    (module,) = modules_of(built(Whole), stage, False)
    if engine == "DDP":
        module = DistributedDataParallel(module, process_group=mesh["replica"].get_group())
    else:
        fully_shard(module, mesh=mesh["replica"])
    opt = nusam.NuSAM(sgd(module), RHO, power_iterations=ITERATIONS, model=module, **options)
    part = PipelineStage(module, stage, 2, torch.device(DEVICE), group=mesh["stage"].get_group())
    schedule = kind(part, n_microbatches=3, loss_fn=F.cross_entropy)
    for step in range(5):
        x, y = sample(step, replica)
        for _ in opt.passes():
            schedule.step(*(() if stage else (x,)), **({"target": y, "losses": []} if stage else {}))
        opt.step()
    (theirs,) = modules_of(expected, stage, False)
    for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(full(p), q, rtol=0, atol=1e-6)


for engine in ("DDP", "FSDP2"):
    for ascent in ("gradient", "matrix-free"):
        CHECKS[4][f"pipeline: {engine} {ascent}"] = partial(
            equals_one_process_with_replicas, engine, Schedule1F1B, ascent=ascent
        )


@check(4, among=CHECKS)
def ddp_inside_a_stage_has_no_m_sam():
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("stage", "replica"))
    (module,) = modules_of(built(Whole), mesh["stage"].get_local_rank(), False)
    module = DistributedDataParallel(module, process_group=mesh["replica"].get_group())
    opt = nusam.NuSAM(sgd(module), RHO, model=module, m_sam=True)
    stage = PipelineStage(
        module, mesh["stage"].get_local_rank(), 2, torch.device(DEVICE), group=mesh["stage"].get_group()
    )
    with pytest.raises(RuntimeError, match="m_sam needs an ascent that reduces no gradient, but a pipeline makes DDP"):
        next(iter(opt.passes()))
    del stage


@check(2, among=CHECKS)
def pipeline_stages_can_not_share_a_radius():
    for method in METHODS[1:]:
        (module,) = modules_of(built(Whole), dist.get_rank(), False)
        if method is nusam.SAMON:
            module.append(nn.LayerNorm(3 if dist.get_rank() else 7, dtype=torch.float64))
        early = method(sgd(module), RHO, model=module)
        without = None if method is nusam.SAMON else method(sgd(module), RHO)
        other = copy.deepcopy(module)
        schedule = pipeline(ScheduleGPipe, [module])
        for opt in (early, without):
            if opt is not None:
                with pytest.raises(NotImplementedError, match="of which a pipeline stage holds a part; use NuSAM"):
                    next(iter(opt.passes()))
        with pytest.raises(NotImplementedError, match="of which a pipeline stage holds a part; use NuSAM"):
            method(sgd(module), RHO, model=module)
        method(sgd(other), RHO, model=other)  # a model beside the pipeline
        del schedule


# ------------------------------------------------------------------------------- several DDPs


class Parts(nn.Module):
    """A generator and a critic, each wrapped for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Net(), nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(self.generator(x))


def parts_backward(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x), y).backward()


def several_ddps(ball, **options):
    expected = built(Parts)
    epsilons = {"NuSAM": oracle.nu_sam, "SAM": oracle.sam}[ball]
    oracle.train(expected, parts_backward, epsilons, RHO, RATE, 5, dist.get_world_size())
    model = built(Parts)
    model.generator = DistributedDataParallel(model.generator)
    model.critic = DistributedDataParallel(model.critic)
    iterations = {"power_iterations": ITERATIONS} if ball == "NuSAM" else {}
    opt = getattr(nusam, ball)(sgd(model), RHO, model=model, **iterations, **options)
    for step in range(5):
        for _ in opt.passes():
            parts_backward(model, step, dist.get_rank())
        opt.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


CHECKS[2]["several DDPs: SAM"] = partial(several_ddps, "SAM")
for ascent in ("gradient", "matrix-free"):
    CHECKS[2][f"several DDPs: NuSAM {ascent}"] = partial(several_ddps, "NuSAM", ascent=ascent)
