"""Algorithms 1 and 2 of the paper exactly as printed, and the formulas of the methods beside νSAM.

This is the slow, plain version that everything else in the package is tested against. It keeps what
the fast path deliberately changes: an absolute τ, and a warm start that a zero gradient kills.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = [
    "asam",
    "friendly",
    "gsam",
    "look_back",
    "look_back_kept",
    "nusam_step",
    "rwp",
    "sam",
    "ssam_mask",
    "svd_top1",
    "vasso",
    "weighted",
]

Tensors = Sequence[Tensor]


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


# ---------------------------------------------------------------- the family: w weights, g and g_hat their gradients


def norm(xs: Tensors) -> Tensor:
    """‖x‖₂ of all together."""
    return torch.sqrt(dot(xs, xs))


def dot(xs: Tensors, ys: Tensors) -> Tensor:
    """⟨x, y⟩ of all together."""
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def sam(g: Tensors, rho: float) -> list[Tensor]:
    """ε = ρg/‖g‖ (Foret et al. 2020)."""
    return [rho * x / norm(g) for x in g]


def asam(w: Tensors, g: Tensors, rho: float, eta: float) -> list[Tensor]:
    """ε = ρT²g/‖Tg‖ with T = |w| + η, and 1 for parameters of one dimension (Kwon et al. 2021)."""
    T = [x.abs() + eta if x.ndim > 1 else torch.ones_like(x) for x in w]
    Tg = [t * x for t, x in zip(T, g, strict=True)]
    return [rho * t * x / norm(Tg) for t, x in zip(T, Tg, strict=True)]


def vasso(d: Tensors, g: Tensors, theta: float) -> list[Tensor]:
    """d ← (1−θ)d + θg (Li & Giannakis 2024)."""
    return [(1 - theta) * a + theta * b for a, b in zip(d, g, strict=True)]


def friendly(m: Tensors | None, g: Tensors, sigma: float, lmbda: float) -> tuple[list[Tensor], list[Tensor]]:
    """d = g − σm and then m ← λm + (1−λ)g; both are g in the first step (Li et al. 2024)."""
    if m is None:
        return list(g), list(g)
    d = [b - sigma * a for a, b in zip(m, g, strict=True)]
    return d, [lmbda * a + (1 - lmbda) * b for a, b in zip(m, g, strict=True)]


def ssam_mask(g: Tensors, sparsity: float) -> list[Tensor]:
    """1 on the share 1−s of all entries with the largest g² (Mi et al. 2022)."""
    squares = torch.cat([x.flatten() ** 2 for x in g])
    count = math.ceil((1 - Fraction(str(sparsity))) * squares.numel())
    least = squares.sort(descending=True).values[count - 1]
    return [(x**2 >= least).to(x.dtype) for x in g]


def rwp(w: Tensors, e: Tensors, sigma: float) -> list[Tensor]:
    """ε = σ‖w_row‖e with Gaussian e, row by row; a vector is one row (Li et al. 2024)."""
    rows = [x.flatten(1) if x.ndim > 1 else x[None] for x in w]
    return [(sigma * r.norm(dim=1, keepdim=True) * x.view(r.shape)).view(x.shape) for r, x in zip(rows, e, strict=True)]


def gsam(g: Tensors, g_hat: Tensors, alpha: float) -> list[Tensor]:
    """ĝ − α(g − (⟨g,ĝ⟩/‖ĝ‖²)ĝ) (Zhuang et al. 2022)."""
    along = dot(g, g_hat) / dot(g_hat, g_hat)
    return [b - alpha * (a - along * b) for a, b in zip(g, g_hat, strict=True)]


def weighted(g: Tensors, g_hat: Tensors, weight: float) -> list[Tensor]:
    """(1−w)g + wĝ: WSAM with w = γ/(1−γ) (Yue et al. 2023), m-RWP with w = λ."""
    return [(1 - weight) * a + weight * b for a, b in zip(g, g_hat, strict=True)]


def look_back_kept(g: Tensors, g_hat: Tensors) -> list[Tensor]:
    """v = ĝ − ⟨ĝ,u⟩u with u = g/‖g‖ (Liu et al. 2022)."""
    u = [x / norm(g) for x in g]
    return [b - dot(g_hat, u) * a for a, b in zip(u, g_hat, strict=True)]


def look_back(g: Tensors, v: Tensors, alpha: float) -> list[Tensor]:
    """g + α(‖g‖/‖v‖)v."""
    return [a + alpha * norm(g) / norm(v) * b for a, b in zip(g, v, strict=True)]
