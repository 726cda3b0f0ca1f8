"""Both sides of every diff on the migration page train, and where both can be run they end at the same weights."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nusam
from tests.conftest import mlp

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text("utf-8")
(TAKEN_UP,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
DAVDA54, CLOSURE, HALVES, TO_NUSAM = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)


def side(diff, sign):
    """One side of a diff as a program."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line or line[0] in (" ", sign))


def trained(program, **names):
    """A model after the program; and what the program left behind."""
    torch.manual_seed(0)
    model = mlp()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    loader = list(zip(x.split(8), x[:, :4].argmax(1).split(8), strict=True))
    scope = {"torch": torch, "nusam": nusam, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()}
    scope |= names
    exec(program, scope)
    return model, scope


def assert_same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def foreign():
    """SAM of pytorch_optimizer."""
    return pytest.importorskip("pytorch_optimizer", reason="the extra bench is not installed").SAM


@pytest.mark.parametrize("diff", [CLOSURE, HALVES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_pytorch_optimizer(diff):
    theirs, _ = trained(side(diff, "-"), SAM=foreign())
    ours, scope = trained(side(diff, "+"))
    assert isinstance(scope["optimizer"], nusam.SAM)
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("diff", [CLOSURE, HALVES])
def test_a_checkpoint_of_pytorch_optimizer_is_taken_up(diff):
    theirs, before = trained(side(diff, "-") + "\nsaved = optimizer.state_dict()\n" + _loop(diff, "-"), SAM=foreign())
    resumed = f"{side(diff, '-')}\nsaved = optimizer.state_dict()\n{_made(diff)}\n{TAKEN_UP}"
    ours, _ = trained(resumed + _loop(diff, "+"), SAM=foreign())
    assert before["saved"]["state"]
    assert_same(ours, theirs)


def test_from_davda54():
    """The + side, against its - side written out: that package is on no index."""
    ours, _ = trained(side(DAVDA54, "+"))
    old = {"SAM": _Written, "enable_running_stats": lambda model: None, "disable_running_stats": lambda model: None}
    theirs, _ = trained(side(DAVDA54, "-"), **old)
    assert_same(ours, theirs)


@pytest.mark.parametrize("sign", "-+")
def test_from_sam_to_nusam(sign):
    model, scope = trained(side(TO_NUSAM, sign))
    assert isinstance(scope["optimizer"], nusam.NuSAM if sign == "+" else nusam.SAM)
    torch.manual_seed(0)
    assert not torch.equal(model[0].weight, mlp()[0].weight)


def _loop(diff, sign):
    """All of one side but the line that makes the optimizer."""
    program = side(diff, sign)
    return program[program.index("for x, y") :]


def _made(diff):
    program = side(diff, "+")
    return program[: program.index("for x, y")]


class _Written:
    """What first_step and second_step mean: ε = ρ·g/‖g‖ over all parameters, and back again."""

    def __init__(self, parameters, base_optimizer, rho, **options):
        self.parameters = list(parameters)
        self.base_optimizer = base_optimizer(self.parameters, **options)
        self.rho = rho

    @torch.no_grad()
    def first_step(self, zero_grad):
        norm = torch.cat([p.grad.flatten() for p in self.parameters]).norm()
        self.before = [p.clone() for p in self.parameters]
        for p in self.parameters:
            p += self.rho * p.grad / norm
        self.base_optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad):
        for p, before in zip(self.parameters, self.before, strict=True):
            p.copy_(before)
        self.base_optimizer.step()
        self.base_optimizer.zero_grad()
