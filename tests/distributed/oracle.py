"""What several processes must come to, worked out by one, in float64, from singular value decompositions.

Shares no code with the library: the joint gradient is the mean of what each process's backward leaves in a plain
model, ε comes from an SVD of it, and the weights are copied aside.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Backward = Callable[[nn.Module, int], None]  # (model, process): one pass of that process, which leaves gradients


def joint_gradients(model: nn.Module, backward: Backward, processes: int) -> Gradients:
    """The mean over processes; no entry where no process has one."""
    total: Gradients = {}
    for process in range(processes):
        model.zero_grad()
        backward(model, process)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad / processes
    model.zero_grad()
    return total


def top(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """u₁v₁ᵀ and σ₁."""
    if not gradient.any():
        return torch.zeros_like(gradient), gradient.new_zeros(())
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    return torch.outer(U[:, 0], Vh[0]), S[0]


def nu_sam(gradients: Gradients, rho: float) -> Gradients:
    return {name: rho * top(G)[0] for name, G in gradients.items() if G.ndim == 2}


def nu_sam_norm(gradients: Gradients, rho: float) -> Gradients:
    tops = {name: top(G) for name, G in gradients.items() if G.ndim == 2}
    joint = torch.stack([sigma for _, sigma in tops.values()]).square().sum().sqrt()
    return {name: rho * sigma / joint * direction for name, (direction, sigma) in tops.items()}


def sam(gradients: Gradients, rho: float) -> Gradients:
    joint = torch.stack([G.square().sum() for G in gradients.values()]).sum().sqrt()
    return {name: rho * G / joint for name, G in gradients.items()}


def train(
    model: nn.Module,
    backward: Callable[[nn.Module, int, int], None],
    epsilons: Callable[[Gradients, float], Gradients],
    rho: float,
    rate: float,
    steps: int,
    processes: int,
) -> nn.Module:
    """Gradient descent by the gradient at x + ε, in place.

    Args:
        model: a plain module in float64.
        backward: (model, step, process) → one pass of that process.
        epsilons: the ball.
        rho: its radius.
        rate: the learning rate.
        steps: how many.
        processes: how many see a share of the batch.
    """
    for step in range(steps):

        def once(model: nn.Module, process: int, step: int = step) -> None:
            backward(model, step, process)

        epsilon = epsilons(joint_gradients(model, once, processes), rho)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in epsilon:
                    parameter.add_(epsilon[name])
        gradients = joint_gradients(model, once, processes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name] - rate * gradients.get(name, torch.zeros_like(parameter)))
    return model
