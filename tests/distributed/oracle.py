"""What several processes must come to, worked out by one, in float64, from singular value decompositions.

Shares no code with the library: the joint gradient is the mean of what each process's backward leaves in a plain
model, ε comes from an SVD of it, and the weights are copied aside.
"""

from collections.abc import Callable, Container
from functools import partial

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
    frozen: Container[str] = (),
    each: bool = False,
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
        frozen: names of parameters that are perturbed and not updated.
        each: whether every process has an ε of its own.
    """
    for step in range(steps):

        def once(model: nn.Module, process: int, step: int = step) -> None:
            backward(model, step, process)

        def alone(model: nn.Module, _: int, process: int, step: int = step) -> None:
            backward(model, step, process)

        passes = [partial(alone, process=process) for process in range(processes)] if each else [once]
        found = [at_epsilon(model, one, epsilons, rho, 1 if each else processes) for one in passes]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in frozen:
                    for gradients in found:
                        parameter -= rate / len(found) * gradients.get(name, 0)
    return model


def at_epsilon(
    model: nn.Module,
    backward: Backward,
    epsilons: Callable[[Gradients, float], Gradients],
    rho: float,
    processes: int,
    ascent: Backward | None = None,
) -> Gradients:
    """The joint gradient at x + ε, which is that of another pass if one is given."""
    epsilon = epsilons(joint_gradients(model, ascent or backward, processes), rho)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += epsilon.get(name, 0)
    gradients = joint_gradients(model, backward, processes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return gradients
