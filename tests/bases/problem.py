"""A regression whose loss can be turned round, and SAM and νSAM of it by copies of the weights, in float64."""

import torch
from torch import Tensor, nn

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def net() -> nn.Sequential:
    """Two matrices and two biases, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_of(model: nn.Module, sign: float = 1.0) -> Tensor:
    dtype = next(model.parameters()).dtype
    return sign * (model(X.to(dtype)) - Y.to(dtype)).square().mean()


def closure_of(model: nn.Module, opt, sign: float = 1.0):
    """What torch's closure contract asks for."""

    def closure() -> Tensor:
        opt.zero_grad()
        with torch.enable_grad():  # which some bases leave to their closure
            loss = loss_of(model, sign)
            loss.backward()
        return loss

    return closure


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def sam_step(model: nn.Module, base, rho: float, step=None) -> Tensor:
    """One step of SAM as it is printed, by copies of the weights; ``step`` gets a closure of the loss."""
    parameters = list(model.parameters())
    base.zero_grad()
    loss = loss_of(model)
    loss.backward()
    with torch.no_grad():
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        old = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=float(rho / norm))
    base.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        for p, kept in zip(parameters, old, strict=True):
            p.copy_(kept)
    if step is None:
        base.step()
    else:
        step(lambda: loss.detach())
    return loss.detach()
