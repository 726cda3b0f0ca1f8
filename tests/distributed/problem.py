"""A small problem with a share of the batch for each process, and what one process makes of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nusam
from tests.distributed import oracle
from tests.distributed.engines import DEVICE

STEPS, RATE, RHO, ITERATIONS = 4, 0.2, 0.1, 20


class Net(nn.Module):
    """Two blocks between two matrices, none of them square, and a matrix that a pass may go around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)) for _ in range(2))
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor, blocks: tuple[int, ...] = (0, 1), by_hand: bool = False) -> Tensor:
        x = torch.tanh(self.stem(x))
        for index in blocks:
            x = x + self.blocks[index](x)
        return F.linear(self.norm(x), self.head.weight, self.head.bias) if by_hand else self.head(self.norm(x))


def sample(step: int, process: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + process)
    # most samples are alike, so that gradients have a top singular pair which few iterations find
    x = torch.linspace(1, 2, 5) + 0.3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator) * (torch.rand(6, generator=generator) < 0.3)
    return x.to(DEVICE), y.to(DEVICE)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return build().to(DEVICE, torch.float64)


BALLS = {
    "NuSAM": (partial(nusam.NuSAM, power_iterations=ITERATIONS), oracle.nu_sam),
    "NuSAMNorm": (partial(nusam.NuSAMNorm, power_iterations=ITERATIONS), oracle.nu_sam_norm),
    "SAM": (nusam.SAM, oracle.sam),
}
