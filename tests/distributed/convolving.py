"""Kernels of convolutions among processes, held to one process that perturbs by an SVD of each as a matrix."""

from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed import oracle
from tests.distributed.engines import DEVICE, full
from tests.distributed.problem import ITERATIONS, RATE, RHO, STEPS, built
from tests.distributed.running import Checks, check

CHECKS: Checks = {2: {}}


class Net(nn.Module):
    """Kernels of 5, 6 and 1 rows: uneven and empty shards on two processes; and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect")
        self.conv = nn.Conv2d(5, 6, (3, 2), padding="same", dilation=2)
        self.grouped, self.one = nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 1, 1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.tanh(self.conv(torch.tanh(self.stem(x)))))
        return self.head((torch.tanh(x) * self.one(x)).mean((2, 3)))


def sample(step: int, process: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + process)
    # most samples are alike, so that gradients have a top singular pair which few iterations find
    x = torch.linspace(1, 2, 9) + 0.3 * torch.randn(6, 3, 10, 9, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator) * (torch.rand(6, generator=generator) < 0.3)
    return x.to(DEVICE), y.to(DEVICE)


def backward(model: nn.Module, step: int, process: int) -> None:
    x, y = sample(step, process)
    F.cross_entropy(model(x), y).backward()


def nu_sam(gradients: oracle.Gradients, rho: float) -> oracle.Gradients:
    matrices = {name: G for name, G in gradients.items() if G.ndim >= 2}
    return {name: rho * oracle.top(G.reshape(len(G), -1))[0].reshape(G.shape) for name, G in matrices.items()}


@cache
def expected(each: bool) -> dict[str, Tensor]:
    model = built(Net)
    oracle.train(model, backward, nu_sam, RHO, RATE, STEPS, dist.get_world_size(), each=each)
    return dict(model.named_parameters())


def wrapped(engine: str) -> nn.Module:
    model = built(Net)
    if engine == "DDP":
        return DistributedDataParallel(model.to(memory_format=torch.channels_last))
    for module in (model.conv, model.grouped):
        fully_shard(module)
    return fully_shard(model)


def method(model: nn.Module, **options: object) -> nusam.NuSAM:
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    return nusam.NuSAM(base, RHO, model=model, convolutions=True, power_iterations=2 * ITERATIONS, **options)


def equals_one_process(engine: str, each: bool, **options: object) -> None:
    model = wrapped(engine)
    opt = method(model, m_sam=each, **options)
    for step in range(STEPS):
        for _ in opt.passes():
            backward(model, step, dist.get_rank())
        opt.step()
    assert not [key for key in opt.metrics() if key.startswith("fallback/")]
    for name, parameter in model.named_parameters():
        wanted = expected(each)[name.removeprefix("module.")]
        torch.testing.assert_close(full(parameter), wanted, rtol=0, atol=1e-6)


WAYS = {
    "gradient weights": {"ascent": "gradient", "placement": "weights"},
    "matrix-free weights": {"ascent": "matrix-free", "placement": "weights"},
    "matrix-free forward": {"ascent": "matrix-free", "placement": "forward"},
}
for (way, options), engine, each in product(WAYS.items(), ("DDP", "FSDP2"), (False, True)):
    if each and engine == "FSDP2" and way != "matrix-free forward":
        continue  # the only way there is
    name = f"convolutions: {engine} {'m-SAM ' if each else ''}{way}"
    CHECKS[2][name] = partial(equals_one_process, engine, each, **options)


@check(2, among=CHECKS)
def kernels_that_are_cut_within_their_rows_are_refused() -> None:
    model = built(Net)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape[1:2] == (6,) else None)
    with pytest.raises(NotImplementedError, match="shard it along its first dimension, or exclude it with targets="):
        method(model)
    assert method(model, targets=lambda name, _: not name.startswith(("one", "grouped"))).coverage().perturbed > 0
