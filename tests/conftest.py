"""Small problems that the tests share."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

FETCHED = Path(__file__).parents[1] / ".venv" / "test-data"  # by tests/fetch_data.py
if FETCHED.is_dir():
    os.environ.setdefault("NUSAM_ENCODERS", str(FETCHED))
    os.environ.setdefault("NUSAM_SENTENCES", str(FETCHED))

settings.register_profile("nusam", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("nusam")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_about_unperturbed_runs(request):
    """Most tests stop before the perturbation matters; those that test the warning ask for it."""
    if "never_perturbed_warning" in request.fixturenames:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The perturbation has not been active")
        yield


@pytest.fixture
def never_perturbed_warning():
    """Let the warning through."""


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices, two biases and a normalization layer."""
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 4)).to(dtype)


def batch(step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The same sample for the same step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 4, (16,), generator=generator)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """Cross-entropy of the step's sample, in the model's dtype."""
    x, y = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), y)


def train_step(model: nn.Module, opt, step: int = 0) -> None:
    """One step of the documented loop."""
    for _ in opt.passes():
        loss_of(model, step).backward()
    opt.step()


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of every parameter."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_unperturbed(model: nn.Module, before: list[Tensor], rho: float = 0.05) -> None:
    """Every weight is what it was, to 1 ulp of the larger of w and w + ε with |ε| ≤ ρ."""
    for parameter, old in zip(model.parameters(), before, strict=True):
        ulp = torch.finfo(old.dtype).eps * (old.abs() + rho)
        assert ((parameter.detach() - old).abs() <= ulp).all()
