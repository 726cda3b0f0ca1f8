"""Algorithms 1 and 2 of the paper exactly as printed.

This is the slow, plain version that everything else in the package is tested against. It keeps what
the fast path deliberately changes: an absolute τ, and a warm start that a zero gradient kills.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["svd_top1", "nusam_step"]


def svd_top1(A: Tensor, u: Tensor, T: int = 1, tau: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Algorithm 2: the top singular pair of ``A`` (n×m) by ``T`` power iterations from ``u`` (n).

    Returns ``(u, v)`` with shapes (n) and (m).
    """
    v = A.new_zeros(A.shape[1])
    for _ in range(T):
        v = A.T @ u
        v = v / (torch.linalg.vector_norm(v) + tau)
        u = A @ v
        u = u / (torch.linalg.vector_norm(u) + tau)
    return u, v


def nusam_step(
    M: Sequence[Tensor],
    u: Sequence[Tensor],
    grad: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    rho: float,
    gamma: float,
    T: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Algorithm 1: one νSAM step with gradient descent of step size ``gamma`` as the base optimizer.

    ``M`` are the weight matrices, ``u`` their warm starts and ``grad`` maps matrices to the gradient of
    the loss on the step's sample. Returns the new matrices and warm starts.
    """
    pairs = [svd_top1(G, u_i, T) for G, u_i in zip(grad(M), u, strict=True)]
    M_tilde = [M_i + rho * torch.outer(u_i, v_i) for M_i, (u_i, v_i) in zip(M, pairs, strict=True)]
    M_next = [
        M_tilde_i - rho * torch.outer(u_i, v_i) - gamma * G
        for M_tilde_i, (u_i, v_i), G in zip(M_tilde, pairs, grad(M_tilde), strict=True)
    ]
    return M_next, [u_i for u_i, _ in pairs]
