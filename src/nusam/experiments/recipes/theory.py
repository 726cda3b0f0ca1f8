"""Section 4 and Figure 1: how fast each perturbation lets gradient descent converge on f(X) = L/2·‖X − B‖_F².

X and B are stacks of matrices, a matrix for each seed, in float64. The bounds of Theorems 4.3 and 4.6 are here as
functions, so that the tests can hold them against random problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "BALLS",
    "Ball",
    "METHODS",
    "Product",
    "Setting",
    "Trace",
    "descent_bound",
    "expected_gauss_sam",
    "rate_bound",
    "repaired_descent_bound",
    "simulate",
    "slopes",
    "stationarity_bound",
    "stationarity_rate",
]

POINTS = 200  # of a curve


Array = NDArray[np.float64]
Perturbation = Callable[[Array], Array]  # from the gradients (S, n, m) to ε (S, n, m)


@dataclass(frozen=True)
class Setting:
    """A quadratic, its start and the steps γ_k = c/(L·k^decay) for k = 1, 2, …"""

    rho: float = 0.1
    c: float = 0.5  # a half is what gives gradient descent the figure's O(1/k)
    decay: float = 1.0  # 0: constant steps
    L: float = 1.0
    shape: tuple[int, int] = (4, 3)
    distance: float | None = None  # ‖X⁰ − B‖_F; None: the entries of X⁰ − B are N(0, 1)
    steps: int = 100_000
    seeds: int = 8

    def start(self) -> tuple[Array, Array]:
        """X⁰ and B (S, n, m)."""
        rng = np.random.default_rng(0)
        B, D = rng.standard_normal((2, self.seeds, *self.shape))
        return B + (D if self.distance is None else _unit(D) * self.distance), B


class Trace(NamedTuple):
    """Squared gradient norms at P values of k, evenly spaced in log k, for S seeds."""

    k: Array  # (P,)
    least: Array  # (P, S) min_{i<k} ‖∇f(xⁱ)‖²
    envelope: Array  # (P, S) the larger of the last two ‖∇f(xⁱ)‖², i < k


def simulate(method: str, setting: Setting) -> Trace:
    """Eq. (10): x̃ = x + ρ·ε, x⁺ = x − γ_k·∇f(x̃), from every seed's start."""
    X, B = setting.start()
    L, rho = setting.L, setting.rho
    perturbation, epsilon = METHODS[method](X.shape), np.zeros_like(X)
    recorded = _evenly_in_log(setting.steps)
    wanted = set(recorded.tolist())
    least, previous = np.full(len(X), np.inf), np.zeros(len(X))
    leasts, envelopes = [], []
    for k in range(1, setting.steps + 1):
        G = L * (X - B)
        current = _squared(G)
        least = np.minimum(least, current)
        if k in wanted:
            leasts.append(least)
            envelopes.append(np.maximum(previous, current))
        previous = current
        # ε is zero where the gradient rounds to zero, of which any ε of the ball is an Arg max. Keeping the last one
        # lets the run go on as in exact arithmetic, where iterates come close to the solution but do not hit it.
        new = perturbation(G)
        epsilon = np.where(new.any(axis=(1, 2), keepdims=True), new, epsilon)
        gamma = setting.c / (L * k**setting.decay)
        X = X - gamma * L * (X + rho * epsilon - B)
    return Trace(recorded.astype(np.float64), np.array(leasts), np.array(envelopes))


def _gd(shape: tuple[int, ...]) -> Perturbation:
    return np.zeros_like


def _sam(shape: tuple[int, ...]) -> Perturbation:
    return _unit


def _nusam(shape: tuple[int, ...]) -> Perturbation:
    """u·vᵀ by Algorithm 2 with T = 1, of all matrices at once."""
    S, n, _ = shape
    u = _unit(np.random.default_rng(1).standard_normal((S, n, 1)))

    def perturb(G: Array) -> Array:
        nonlocal u
        v = _unit(np.swapaxes(G, 1, 2) @ u)
        alive = v.any(axis=1, keepdims=True)
        u = np.where(alive, _unit(G @ v), u)  # a zero gradient leaves the warm start as it is
        return np.asarray(u * np.swapaxes(v, 1, 2))

    return perturb


def _gauss_sam(shape: tuple[int, ...]) -> Perturbation:
    rng = np.random.default_rng(1)
    return lambda G: _unit(rng.standard_normal(shape))


def _frozen_gauss(shape: tuple[int, ...]) -> Perturbation:
    e = _unit(np.random.default_rng(1).standard_normal(shape))
    return lambda G: e


METHODS: Mapping[str, Callable[[tuple[int, ...]], Perturbation]] = {
    "GD": _gd,
    "SAM": _sam,
    "νSAM": _nusam,
    "GaussSAM": _gauss_sam,
    "GaussSAM, one draw for all steps": _frozen_gauss,
}


def slopes(k: Array, y: Array, decades: float) -> list[float]:
    """Least-squares slope of log y (P, S) over log k, one for every seed, over the last ``decades`` of k.

    Of a curve that falls to exactly zero, these are the decades before it does. −∞ where fewer than two points of
    it are positive.
    """
    return [_slope(k[column > 0], column[column > 0], decades) for column in y.T]


def _slope(k: Array, y: Array, decades: float) -> float:
    if len(k) < 2:
        return -math.inf
    late = k >= min(k[-1] / 10**decades, k[-2])
    return float(np.polyfit(np.log(k[late]), np.log(y[late]), 1)[0])


def expected_gauss_sam(setting: Setting, distance: float) -> tuple[Array, Array]:
    """The k of a trace, and GaussSAM's E‖∇f(x^{k−1})‖² there from ‖X⁰ − B‖_F = ``distance``, exactly.

    ε has zero mean given the past and unit norm, so E‖x⁺ − b‖² = (1 − γL)²·E‖x − b‖² + (γLρ)², whatever the dimension.
    """
    recorded = _evenly_in_log(setting.steps)
    wanted = set(recorded.tolist())
    square, squares = distance**2, []
    for k in range(1, setting.steps + 1):
        if k in wanted:
            squares.append(square)
        a = setting.c / k**setting.decay
        square = (1 - a) ** 2 * square + (a * setting.rho) ** 2
    return recorded.astype(np.float64), setting.L**2 * np.array(squares)


@dataclass(frozen=True)
class Ball:
    """The unit ball of a norm ‖·‖_* on n×m matrices, with ‖·‖ its dual norm.

    Attributes:
        lmo: G (n, m) to an ε of Arg max { ⟨G, ε⟩ : ‖ε‖_* ≤ 1 }.
        dual_norm: ‖G‖ = ⟨G, lmo(G)⟩.
        xi_star: ξ_* = max ‖x‖₂/‖x‖_* for n, m: the largest ‖ε‖₂.
        xi: ξ = max ‖x‖₂/‖x‖ for n, m.
    """

    lmo: Callable[[Array], Array]
    dual_norm: Callable[[Array], float]
    xi_star: Callable[[int, int], float]
    xi: Callable[[int, int], float]


def _top(G: Array) -> Array:
    U, _, Vh = np.linalg.svd(G, full_matrices=False)
    return np.outer(U[:, 0], Vh[0])


def _polar(G: Array) -> Array:
    U, _, Vh = np.linalg.svd(G, full_matrices=False)
    return np.asarray(U @ Vh)


def _one(n: int, m: int) -> float:
    return 1.0


def _root_rank(n: int, m: int) -> float:
    return math.sqrt(min(n, m))


BALLS: Mapping[str, Ball] = {
    "ℓ2": Ball(lambda G: _unit(G[None])[0], lambda G: float(np.linalg.norm(G)), _one, _one),
    "nuclear": Ball(_top, lambda G: float(np.linalg.norm(G, 2)), _one, _root_rank),
    "spectral": Ball(_polar, lambda G: float(np.linalg.norm(G, "nuc")), _root_rank, _one),
    "ℓ∞": Ball(np.sign, lambda G: float(np.abs(G).sum()), lambda n, m: math.sqrt(n * m), _one),
}


@dataclass(frozen=True)
class Product:
    """A unit ball on l matrices (M_1, …, M_l), made of a ball on each: the norm is a norm of the matrices' ‖M_i‖_*.

    Attributes:
        of_each: the ball on a matrix.
        shared: False for max_i ‖M_i‖_*, where each matrix has the whole radius, as νSAM (Lemma 3.1); True for
            √Σ‖M_i‖_*², where they share one, as νSAM-Norm (eq. (21)).
    """

    of_each: Ball
    shared: bool

    def lmo(self, Gs: Sequence[Array]) -> list[Array]:
        """G_i (n_i, m_i) to ε_i of the same shapes."""
        norms = np.array([self.of_each.dual_norm(G) for G in Gs])
        length = float(np.linalg.norm(norms))
        shares = norms / (length or 1.0) if self.shared else np.ones(len(Gs))
        return [share * self.of_each.lmo(G) for share, G in zip(shares, Gs, strict=True)]

    def dual_norm(self, Gs: Sequence[Array]) -> float:
        """Σ‖G_i‖, or √Σ‖G_i‖² where the radius is shared."""
        norms = [self.of_each.dual_norm(G) for G in Gs]
        return float(np.linalg.norm(norms)) if self.shared else sum(norms)

    def xi_star(self, shapes: Sequence[tuple[int, int]]) -> float:
        """ξ_*: √l for νSAM's ball, 1 for νSAM-Norm's."""
        each = [self.of_each.xi_star(n, m) for n, m in shapes]
        return max(each) if self.shared else float(np.linalg.norm(each))

    def xi(self, shapes: Sequence[tuple[int, int]]) -> float:
        """ξ: reached by a gradient of one matrix alone."""
        return max(self.of_each.xi(n, m) for n, m in shapes)


def descent_bound(gap: float, dual_norm: float, gamma: float, rho: float, L: float, xi_star: float) -> float:
    """Theorem 4.3, eq. (17), as printed: the bound on f(x^{k+1}) − f* where μ = L.

    ``gap`` is f(x^k) − f*, ``dual_norm`` is ‖∇f(x^k)‖ in the norm dual to the ball's, and ``xi_star`` the ball's ξ_*.
    True for γL ≤ 1 only; see :func:`repaired_descent_bound`.
    """
    return _descent(1 - gamma * L, gap, dual_norm, gamma, rho, L, xi_star)


def repaired_descent_bound(gap: float, dual_norm: float, gamma: float, rho: float, L: float, xi_star: float) -> float:
    """Theorem 4.3 with (1 − γL)² for (1 − μγ): below the printed bound for γL ≤ 1, and true for every γ.

    Even an equality where ‖ε‖₂ = ξ_*.
    """
    return _descent((1 - gamma * L) ** 2, gap, dual_norm, gamma, rho, L, xi_star)


def _descent(
    contraction: float, gap: float, dual_norm: float, gamma: float, rho: float, L: float, xi_star: float
) -> float:
    ascent = gamma * (1 - gamma * L) * L * rho * dual_norm
    return contraction * gap - ascent + gamma**2 * L**3 * rho**2 * xi_star**2 / 2


def rate_bound(gap: float, K: int, rho: float, L: float, xi_star: float, xi: float) -> tuple[float, float]:
    """Theorem 4.3's constant step γ for K steps, and the bound on min_k f(x^k) − f* from the end of its proof.

    γ ≤ 0 says that the start is better already than what the theorem promises.
    """
    floor = L**4 * rho**2 * xi_star**4 * xi**2 / (2 * L**3 * K**2)
    log_alpha = math.log(gap / floor)
    gamma = min(log_alpha / (L * K), 1 / (2 * L))
    return gamma, math.exp(-K / 2) * gap + (2 + log_alpha**2) * floor


def stationarity_bound(
    gap: float, gammas: Sequence[float], rhos: Sequence[float], L: float, G: float, xi: float
) -> float:
    """Theorem 4.6: the bound on min_k ‖∇f(x^k)‖₂² for any ε with ‖ε‖₂ ≤ ξ and ‖∇f‖₂ ≤ G, where γ_k < 2/L.

    ``gap`` is f(x⁰) − f*; ``gammas`` and ``rhos`` have an entry for each of the K steps.
    """
    C1, C2 = L**3 * xi**2 / 2, L * G * xi
    steps = list(zip(gammas, rhos, strict=True))
    spent = gap + C1 * sum((gamma * rho) ** 2 for gamma, rho in steps) + C2 * sum(gamma * rho for gamma, rho in steps)
    return spent / sum(gamma * (1 - gamma * L / 2) for gamma in gammas)


def stationarity_rate(gap: float, K: int, L: float, G: float, xi: float) -> tuple[float, float, float]:
    """Theorem 4.6's constant γ and ρ for K steps, and the rate of its last line, with the constants that it leaves out.

    That is 2LΔ₀/√K + 2C₂/√K + 2C₁/(LK^{3/2}): the paper prints Δ₀ without L.
    """
    C1, C2, root = L**3 * xi**2 / 2, L * G * xi, math.sqrt(K)
    return 1 / (L * root), 1 / root, 2 * (L * gap + C2) / root + 2 * C1 / (L * K * root)


def _squared(X: Array) -> Array:
    """‖X‖_F² of each matrix (S,)."""
    return np.asarray(np.einsum("sij,sij->s", X, X))


def _unit(X: Array) -> Array:
    """X/‖X‖_F for each matrix; zero where X is."""
    norm = np.sqrt(_squared(X))[:, None, None]
    return np.asarray(X / np.where(norm > 0, norm, 1))


def _evenly_in_log(steps: int) -> NDArray[np.int64]:
    return np.unique(np.geomspace(1, steps, POINTS).round().astype(np.int64))
