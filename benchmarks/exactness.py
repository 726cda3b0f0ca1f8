"""How exact each ascent and placement is: u and v against a float64 reference, and weights after 1,000 steps.

``python benchmarks/exactness.py``
"""

import copy

import torch
from torch import nn

import nusam
from recording import record

STEPS = 1000


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(dtype)


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x.to(next(model.parameters()).dtype)).float() - 1).square().mean()


def vectors(model: nn.Module, ascent: str) -> list[torch.Tensor]:
    """u of every matrix after three ascents at the same weights."""
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model, ascent=ascent, placement="forward")
    for _ in range(3):
        for _ in opt.passes():
            loss(model, 0).backward()
    state = opt.state_dict()["state"]
    return [entry["nusam_u"].double() for entry in state.values() if "nusam_u" in entry]


def drift(dtype: torch.dtype, placement: str) -> float:
    """Relative change of the weights after many steps at learning rate 0."""
    model = network(dtype)
    before = [p.detach().clone().double() for p in model.parameters()]
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.05, model=model, placement=placement)
    for step in range(STEPS):
        for _ in opt.passes():
            loss(model, step).backward()
    change = sum((p.double() - w).square().sum() for p, w in zip(model.parameters(), before, strict=True))
    return (change / sum(w.square().sum() for w in before)).sqrt().item()


def main() -> None:
    table = []
    reference = vectors(network(torch.float64), "gradient")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for ascent in ("gradient", "matrix-free"):
            found = vectors(copy.deepcopy(network(dtype)), ascent)
            error = max(torch.linalg.vector_norm(a - b).item() for a, b in zip(found, reference, strict=True))
            table.append({"what": f"u, {ascent} ascent", "weights": str(dtype), "error": f"{error:.1e}"})
    for dtype in (torch.float32, torch.bfloat16):
        for placement in ("weights", "forward"):
            row = {"what": f"drift in {STEPS} steps, ε in the {placement}", "weights": str(dtype)}
            table.append({**row, "error": f"{drift(dtype, placement):.1e}"})
    record(
        "exactness",
        "cpu",
        table,
        "Error of u: largest distance to the float64 gradient ascent. Drift: relative change of weights at learning "
        "rate 0, whose floor is 0.",
    )


if __name__ == "__main__":
    main()
