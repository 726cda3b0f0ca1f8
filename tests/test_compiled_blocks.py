"""Blocks that are compiled one by one, as large models are, take the steps of the uncompiled model."""

import copy

import pytest
import torch
from torch import nn

import nusam

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")


def by_wrappers(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")


def by_their_functions(model):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")


def a_layer_alone(model):
    model.blocks[0][0].compile(backend="eager")


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("since", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("placement", ["weights", "forward"])
@pytest.mark.parametrize("compiled", [in_place, by_wrappers, by_their_functions, a_layer_alone])
def test_compiled_blocks_take_the_same_steps(compiled, placement, since):
    torch.manual_seed(0)
    model = Blocks().double()
    twin = copy.deepcopy(model)
    data = [(torch.randn(4, 5).double(), torch.randint(3, (4,))) for _ in range(12)]

    def train(model, compiles):
        opt = nusam.NuSAM(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            rho=0.05,
            model=model,
            ascent="matrix-free",
            placement=placement,
        )
        for step, (x, y) in enumerate(data):
            if compiles and step == since:
                compiled(model)
            for _ in opt.passes():
                nn.functional.cross_entropy(model(x), y).backward()
            opt.step()

    train(model, True)
    train(twin, False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
