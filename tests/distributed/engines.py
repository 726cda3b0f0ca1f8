"""Small problems under every way of distributing them, and the same ones in a single process."""

import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import nusam

# The processes of a machine with a GPU for each of them use those.
DEVICE = "cuda" if torch.cuda.device_count() >= int(os.environ.get("WORLD_SIZE", 1)) else "cpu"
BATCH = 16
STEPS = 6


class Net(nn.Module):
    """Matrices of 5, 8, 6, 7 and 2 rows: uneven and empty shards on four processes; norms and biases between."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh())
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6)
        self.last = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 2))
        self.to(DEVICE, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(torch.tanh(self.up(self.first(x)))))


def sample(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The joint batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x.to(DEVICE), torch.randint(0, 2, (BATCH,), generator=generator).to(DEVICE)


Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module, **options: object) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, mesh: object = None, **options: object) -> nn.Module:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),)) if mesh is None else mesh
    for module in (model.first, model.last):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: object = None) -> nn.Module:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),)) if mesh is None else mesh
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_and_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp(tensor_parallel(model, mesh["tp"]), mesh["dp"])


def hybrid(model: nn.Module) -> nn.Module:
    return fsdp(model, init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard")))


ENGINES: dict[str, tuple[tuple[int, ...], Wrap]] = {  # name → (numbers of processes, how to wrap)
    "DDP": ((2, 4), ddp),
    "FSDP2": ((2, 4), fsdp),
    "TP": ((2,), tensor_parallel),
    "FSDP+TP": ((4,), fsdp_and_tensor_parallel),
    "HSDP": ((4,), hybrid),
}


def shares(engine: str) -> tuple[int, int]:
    """Into how many parts the joint batch is split, and which is this process's."""
    if engine == "TP":
        return 1, 0
    if engine == "FSDP+TP":
        return 2, dist.get_rank() // 2
    return dist.get_world_size(), dist.get_rank()


def base_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if name == "plain SGD" else 0.9)


def full(tensor: Tensor) -> Tensor:
    """All of a parameter."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def micro_batches(step: int, dtype: torch.dtype, accumulate: bool, parts: int, part: int) -> Iterator[tuple]:
    """Of each micro-batch of a step, the share of this process."""
    for x, y in zip(*(t.chunk(2 if accumulate else 1) for t in sample(step, dtype)), strict=True):
        yield x.chunk(parts)[part], y.chunk(parts)[part]


def train(
    model: nn.Module,
    opt: nusam.SharpnessAware,
    dtype: torch.dtype,
    accumulate: bool = False,
    parts: int = 1,
    part: int = 0,
    steps: int = STEPS,
    first: int = 0,
) -> list[float]:
    """The documented loop; returns the loss of every pass."""
    losses = []
    for step in range(first, first + steps):
        opt.zero_grad()
        for x, y in micro_batches(step, dtype, accumulate, parts, part):
            for _ in opt.passes(accumulate=accumulate):
                loss = nn.functional.cross_entropy(model(x), y) / (2 if accumulate else 1)
                loss.backward()
                losses.append(loss.item())
        opt.step()
    return losses
