"""What ε costs: counted against the paper's figures, and against what the allocator holds."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import nusam
from nusam.memory import footprint, perturbation_numel
from tests.conftest import mlp

MB = 2**20


@pytest.mark.parametrize(("name", "numel"), [("vit_large_patch16_224", 395_240), ("vit_base_patch16_224", 149_224)])
def test_the_papers_counts(name, numel):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert perturbation_numel(model) == numel
    assert nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1)).perturbation_numel() == numel
    if name == "vit_base_patch16_224":
        total = sum(p.numel() for p in model.parameters())
        assert total == 86_567_656
        assert 1 - numel / total > 0.998  # "saving more than 99.8%", abstract


def test_every_method_is_counted():
    model = mlp()  # 9×6 and 4×9 matrices, biases of 9 and 4, a layer norm of 9
    assert perturbation_numel(model, nusam.NuSAM) == 15 + 13
    assert perturbation_numel(model, nusam.NuSAMNorm) == 15 + 13
    assert perturbation_numel(model, nusam.SAM) == 54 + 36 + 9 + 4 + 18
    assert perturbation_numel(model, nusam.GaussSAM) == 54 + 36 + 9 + 4 + 18
    assert perturbation_numel(model, nusam.SAMON) == 18
    cost = footprint(model, nusam.NuSAM)
    assert (cost.weights, cost.gradients, cost.perturbation) == (4 * 121, 4 * 121, 4 * 28)
    assert cost.total == 4 * (121 + 121 + 28)
    assert footprint(mlp(torch.bfloat16), nusam.NuSAM).perturbation == 4 * 28
    assert footprint(mlp(torch.bfloat16), nusam.SAM).perturbation == 2 * 121


class HundredMillion(nn.Module):
    """25 matrices of 2000×2000, on one sample: activations are nothing beside the weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2000, 2000) for _ in range(25))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def allocated_by(build, prepare, folder):
    """The allocator's live bytes at the end of each pass and after the step, and their peak, from one step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build()
        opt = prepare(model)
        x = torch.randn(1, 2000)
        for name in opt.passes():
            model(x).square().mean().backward()
            with record_function(f"mark {name}"):
                pass
        opt.step()
        opt.zero_grad()
        with record_function("mark step"):
            pass
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live, peak, at = 0, 0, {}
    for event in sorted((e for e in events if "ts" in e), key=lambda e: float(e["ts"])):
        if event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
        elif event["name"].startswith("mark "):
            at[event["name"].removeprefix("mark ")] = live
    return model, at, peak


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.NuSAMNorm, nusam.SAM])
def test_live_bytes_while_perturbed_counted_by_the_allocator(kind, tmp_path):
    model, at, peak = allocated_by(
        HundredMillion, lambda model: kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05), tmp_path
    )
    cost = footprint(model, kind)
    assert cost.weights == cost.gradients == 4 * 100_050_000
    # Σ(n+m) floats for a rank-one ε, a second copy of the weights for SAM
    assert cost.perturbation == (cost.weights if kind is nusam.SAM else 4 * 25 * 4000)
    assert cost.total <= at["descent"] <= cost.total + MB
    assert at["ascent"] <= cost.weights + cost.gradients + MB
    assert peak <= cost.total + MB
    left = 0 if kind is nusam.SAM else 4 * 25 * 2000  # one warm start a matrix
    assert cost.weights + left <= at["step"] <= cost.weights + left + MB // 4


def test_a_matrix_free_ascent_holds_no_gradient(tmp_path):
    model, at, _ = allocated_by(
        HundredMillion, lambda m: nusam.NuSAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m), tmp_path
    )
    cost = footprint(model, nusam.NuSAM)
    assert at["ascent"] <= cost.weights + 4 * cost.perturbation + MB // 2
    assert cost.total <= at["descent"] <= cost.total + MB
