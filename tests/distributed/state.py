"""Buffers, and weights that the forward writes, in several processes: as one forward in each process leaves them."""

import copy
from collections.abc import Iterator
from itertools import product

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed.engines import DEVICE, full
from tests.distributed.running import Checks
from tests.guards.stateful import KINDS, model_with
from tests.guards.writers import Parent, Table, by_replacement, decayed_through_data
from tests.guards.writers import model_with as writing

CHECKS: Checks = {2: {}}
METHODS = {
    "SAM": (nusam.SAM, {}),
    "by gradients": (nusam.NuSAM, {"ascent": "gradient"}),
    "matrix-free": (nusam.NuSAM, {"ascent": "matrix-free"}),
    "in the forward": (nusam.NuSAM, {"placement": "forward"}),
    "m-SAM": (nusam.NuSAM, {"m_sam": True}),
}
MOVING = ["batch norm", "statistics by assignment", "codebook", "large codebook", "queue", "router", "absent at first"]


def inputs(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    return torch.randn(10, 6, generator=generator, dtype=torch.float64).to(DEVICE)


def optimizer(method: str, model: nn.Module, lr: float) -> nusam.SharpnessAware:
    kind, options = METHODS[method]
    trainable = [p for p in model.parameters() if p.requires_grad]
    return kind(torch.optim.SGD(trainable, lr=lr), rho=0.3, model=model, **options)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def seen_by(module: nn.Module) -> list[dict[str, torch.Tensor]]:
    """What the module's buffers are as each of its forwards begins."""
    seen: list[dict[str, torch.Tensor]] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(buffers(module)))
    return seen


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs. Raising before all steps are over would leave the other process waiting."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-9, equal_nan=True)]


def each(**options: list) -> Iterator[dict]:
    for values in product(*options.values()):
        yield dict(zip(options, values, strict=True))


def assert_none(wrong: list) -> None:
    assert not wrong, wrong[:5]


def under_ddp() -> None:
    wrong: list = []
    for number, case in enumerate(each(kind=MOVING, method=list(METHODS))):
        case["broadcasts"] = number % 2 == 0
        made = model_with(case["kind"]).to(DEVICE)
        once = DistributedDataParallel(copy.deepcopy(made), broadcast_buffers=case["broadcasts"])
        model = DistributedDataParallel(made, broadcast_buffers=case["broadcasts"])
        opt = optimizer(case["method"], model, 0.05)
        seen = seen_by(made[1])
        for step in range(3):
            with torch.no_grad():
                for old, new in zip(once.parameters(), model.parameters(), strict=True):
                    old.copy_(new)
            once(inputs(step)).square().mean().backward()
            for _ in opt.passes():
                model(inputs(step)).square().mean().backward()
            opt.step()
            wrong += [(case, step, name) for name in differing(buffers(made), buffers(once.module))]
            wrong += [(case, step, "begins otherwise", name) for name in differing(*seen[-2:])]
    assert_none(wrong)


def under_fsdp() -> None:
    wrong: list = []
    for case in each(kind=MOVING, method=list(METHODS)):
        alone = model_with(case["kind"]).to(DEVICE)
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        model = model_with(case["kind"]).to(DEVICE)
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = optimizer(case["method"], model, 0.05)
        for step in range(3):
            with torch.no_grad():
                for old, new in zip(alone.parameters(), model.parameters(), strict=True):
                    old.copy_(full(new))
            alone(inputs(step))
            for _ in opt.passes():
                model(inputs(step)).square().mean().backward()
            opt.step()
            wrong += [(case, step, name) for name in differing(buffers(model), buffers(alone))]
    assert_none(wrong)


def written_under_ddp() -> None:
    wrong: list = []
    for case in each(place=[Table, Parent], write=[by_replacement, decayed_through_data], method=list(METHODS)):
        if case["method"] == "in the forward":
            continue
        made = writing(case["place"], case["write"]).to(DEVICE)
        model = DistributedDataParallel(made)
        opt = optimizer(case["method"], model, 0.0)
        for step in range(3):
            once = copy.deepcopy(made)
            once(inputs(step))
            for _ in opt.passes():
                model(inputs(step)).square().mean().backward()
            opt.step()
            weights = {"weight": next(made.parameters())}, {"weight": next(once.parameters())}
            wrong += [(case, step, name) for name in differing(*weights)]
    assert_none(wrong)


def ordinary_weights_are_not_copied_under_fsdp() -> None:
    """Not even uneven shards, which FSDP2 moves about at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).to(DEVICE)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = optimizer("by gradients", model, 0.1)
    for step in range(3):
        for _ in opt.passes():
            model(inputs(step).float()).square().mean().backward()
        opt.step()
    assert not any(opt._written.writes(p) for p in model.parameters())


CHECKS[2] = {
    check.__name__: check
    for check in (under_ddp, under_fsdp, written_under_ddp, ordinary_weights_are_not_copied_under_fsdp)
}
assert set(MOVING) <= KINDS.keys()
