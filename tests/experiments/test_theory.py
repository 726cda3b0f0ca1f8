"""Figure 1's slopes, and Theorems 4.3 and 4.6 against random problems, with the cases in which they are wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nusam import lmo
from nusam.experiments.recipes.convergence import fig1
from nusam.experiments.recipes.theory import (
    BALLS,
    METHODS,
    Product,
    Setting,
    descent_bound,
    expected_gauss_sam,
    rate_bound,
    repaired_descent_bound,
    simulate,
    slopes,
    stationarity_bound,
    stationarity_rate,
)
from nusam.reference import nusam_step

SETTING = Setting()
SHORTER = replace(SETTING, steps=30_000)

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)
balls = st.sampled_from(sorted(BALLS))
smoothness = st.floats(0.05, 20)
radii = st.floats(0, 10)


@pytest.fixture(scope="module")
def traces():
    """Every method of the figure."""
    return {method: simulate(method, SHORTER) for method in ("GD", "SAM", "νSAM", "GaussSAM")}


def quadratic(L, D):
    """F(x) − f* and ∇f(x) at x − b = D."""
    return L / 2 * float((D**2).sum()), L * D


def step(ball, D, gamma, rho, L):
    """A step of eq. (10) from x − b = D."""
    _, G = quadratic(L, D)
    return D - gamma * L * (D + rho * BALLS[ball].lmo(G))


def below(value, bound, scale):
    """Value ≤ bound but for rounding."""
    return value <= bound + 1e-10 * scale


# Figure 1


@pytest.mark.slow
def test_gd_falls_as_one_over_k(traces):
    k, least, _ = traces["GD"]
    assert slopes(k, least, 2) == pytest.approx([-1] * SETTING.seeds, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SAM", "νSAM"])
def test_the_gradients_direction_gives_at_least_one_over_k_squared(method, traces):
    k, least, envelope = traces[method]
    assert max(slopes(k, least, 2)) <= -1.9
    # ‖∇f‖ = Lργ_k·L is what a last full step leaves at most; of two successive ones, one is no less than half.
    late = k >= SHORTER.steps / 10
    leftover = envelope[late] * (k[late, None] / SETTING.rho / SETTING.c) ** 2
    assert (leftover > 0.2).all()
    assert (leftover < 1.1).all()


@pytest.mark.slow
def test_gauss_sam_converges_as_one_over_k(traces):
    """The paper sees no convergence."""
    k, least, _ = traces["GaussSAM"]
    assert np.mean(slopes(k, least, 2)) == pytest.approx(-1, abs=0.05)


def test_gauss_sam_looks_nonconvergent_while_the_start_is_the_minimum():
    far = replace(SETTING, rho=400.0, distance=1.0)
    k, least, envelope = simulate("GaussSAM", far)
    assert (least[-1] == least[0]).all()
    assert np.mean(slopes(k, envelope, 1)) < -0.7  # though it is falling
    _, expected = expected_gauss_sam(replace(far, steps=1_000_000), 1.0)
    assert expected[-1] < 0.7  # below the start's in the end


def test_gauss_sam_with_one_draw_stays_at_rho():
    _, _, envelope = simulate("GaussSAM, one draw for all steps", replace(SETTING, steps=20_000))
    assert envelope[-1] == pytest.approx([SETTING.rho**2] * SETTING.seeds, rel=0.5)


@pytest.mark.parametrize("c", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("rho", [0.1, 1.0, 100.0])
def test_gauss_sam_is_expected_to_converge_for_every_radius_and_step(c, rho):
    k, expected = expected_gauss_sam(replace(SETTING, c=c, rho=rho), 1.0)
    slope = slopes(k, expected[:, None], 1)[0]
    assert slope == pytest.approx(-min(2 * c, 1), abs=0.12)  # c = ½ has a logarithm on top


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (12, 12)])
def test_the_expectation_of_gauss_sam_does_not_depend_on_the_dimension(shape):
    setting = Setting(rho=1.0, shape=shape, distance=2.0, steps=50, seeds=4000)
    _, expected = expected_gauss_sam(setting, 2.0)
    simulated = simulate("GaussSAM", setting).envelope.mean(axis=1)  # an upper bound of the last
    assert (simulated >= 0.9 * expected).all()
    assert (simulated <= 1.7 * np.maximum(expected, np.roll(expected, 1))).all()


def test_constant_steps_leave_every_method_in_a_neighbourhood():
    setting = replace(SETTING, decay=0.0, steps=2000)
    a, rho = setting.c, setting.rho
    _, expected = expected_gauss_sam(setting, 1.0)
    assert expected[-1] == pytest.approx(a * rho**2 / (2 - a))
    for method in ("SAM", "νSAM"):
        assert (simulate(method, setting).envelope[-1] > (a * rho) ** 2 / 10).all()


# The simulator


def test_nusam_is_algorithm_1():
    setting = Setting(rho=0.3, shape=(5, 3), steps=30, seeds=2)
    X, B = map(torch.from_numpy, setting.start())
    u = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 5, 1)))
    trace = simulate("νSAM", setting)
    for seed in range(2):
        M, us, squares = [X[seed]], [u[seed, :, 0] / u[seed].norm()], []
        for k in range(1, setting.steps + 1):
            squares.append((M[0] - B[seed]).square().sum().item())
            M, us = nusam_step(M, us, lambda M: [M[0] - B[seed]], setting.rho, setting.c / k)  # noqa: B023
        assert trace.least[:, seed] == pytest.approx([min(squares[: int(k)]) for k in trace.k], rel=1e-9)


def test_sam_moves_along_a_line():
    setting = Setting(rho=0.3, steps=200, seeds=2)
    X, B = setting.start()
    distances = np.linalg.norm(X - B, axis=(1, 2))
    trace = simulate("SAM", setting)
    for k in range(1, setting.steps):
        a = setting.c / k
        distances = abs((1 - a) * distances - a * setting.rho)
        if k + 1 in trace.k:
            assert (trace.envelope[trace.k == k + 1][0] >= distances**2 * (1 - 1e-9)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_start_at_the_solution_is_finite(method):
    trace = simulate(method, Setting(distance=0.0, steps=20, seeds=2))
    assert np.isfinite(trace.least).all()
    assert (trace.least[0] == 0).all()
    assert slopes(trace.k, trace.least, 2) == [-math.inf, -math.inf]


def test_a_slope_is_of_the_decades_before_zero():
    k = np.array([1.0, 10.0, 100.0, 1000.0])
    assert slopes(k, np.array([[1.0, 1e-2, 1e-4, 0.0]]).T, 1) == pytest.approx([-2])
    assert slopes(k, np.array([[1.0, 1.0, 1e-3, 1e-6]]).T, 1) == pytest.approx([-3])


def test_fig1_has_a_row_and_curves_for_every_method():
    result = fig1(steps=300, seeds=2, scale="smoke")
    assert (result.name, result.scale) == ("fig1", "smoke")
    assert [row["method"] for row in result.rows][:4] == ["GD", "SAM", "νSAM", "GaussSAM"]
    assert all(set(row) == set(result.columns) for row in result.rows)
    assert len({curve.panel for curve in result.curves}) == 3
    for curve in result.curves:
        assert len(curve.x) == len(curve.y) <= 200
        assert all(y is None or y > 0 for y in curve.y)
    assert "too few" in result.findings


# The balls


@given(balls, sizes, sizes, seeds)
def test_constants_of_the_balls(ball, n, m, seed):
    G = np.random.default_rng(seed).standard_normal((n, m))
    ball = BALLS[ball]
    epsilon = ball.lmo(G)
    assert (G * epsilon).sum() == pytest.approx(ball.dual_norm(G))
    assert np.linalg.norm(epsilon) <= ball.xi_star(n, m) * (1 + 1e-12)
    assert np.linalg.norm(G) <= ball.xi(n, m) * ball.dual_norm(G) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("ball", "oracle"),
    [("ℓ2", lmo.L2()), ("nuclear", lmo.Nuclear(500)), ("spectral", lmo.Spectral()), ("ℓ∞", lmo.Linf())],
)
def test_balls_are_the_packages(ball, oracle):
    G = np.random.default_rng(0).standard_normal((5, 3))
    tensor = torch.from_numpy(G.copy())
    (answer,) = oracle([tensor], [1.0], [oracle.init_state(tensor, 0)], 0)
    epsilon = torch.outer(answer.u, answer.v) if isinstance(answer, lmo.RankOne) else answer.epsilon
    np.testing.assert_allclose(BALLS[ball].lmo(G), epsilon.numpy(), atol=1e-9)


PRODUCTS = {"νSAM": Product(BALLS["nuclear"], shared=False), "νSAM-Norm": Product(BALLS["nuclear"], shared=True)}
PRODUCTS |= {f"max of {name}": Product(ball, shared=False) for name, ball in BALLS.items()}
products = st.sampled_from(sorted(PRODUCTS))
shapes_of_several = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4)


@given(products, shapes_of_several, seeds)
def test_constants_of_balls_on_several_matrices(product, shapes, seed):
    rng, product = np.random.default_rng(seed), PRODUCTS[product]
    Gs = [rng.standard_normal(shape) for shape in shapes]
    epsilons = product.lmo(Gs)
    assert sum((G * e).sum() for G, e in zip(Gs, epsilons, strict=True)) == pytest.approx(product.dual_norm(Gs))
    assert length(epsilons) <= product.xi_star(shapes) * (1 + 1e-12)
    assert length(Gs) <= product.xi(shapes) * product.dual_norm(Gs) * (1 + 1e-12)


@given(shapes_of_several, seeds)
def test_xi_star_is_the_root_of_the_number_of_matrices_for_nusam_and_one_for_nusam_norm(shapes, seed):
    rng = np.random.default_rng(seed)
    Gs = [rng.standard_normal(shape) for shape in shapes]
    assert PRODUCTS["νSAM"].xi_star(shapes) == pytest.approx(math.sqrt(len(shapes)))
    assert PRODUCTS["νSAM-Norm"].xi_star(shapes) == 1
    for product in ("νSAM", "νSAM-Norm"):  # every ε of these is as long as any can be
        assert length(PRODUCTS[product].lmo(Gs)) == pytest.approx(PRODUCTS[product].xi_star(shapes))


@pytest.mark.parametrize(("product", "oracle"), [("νSAM", lmo.Nuclear(500)), ("νSAM-Norm", lmo.NuclearNormalized(500))])
def test_balls_on_several_matrices_are_the_packages(product, oracle):
    rng = np.random.default_rng(0)
    Gs = [rng.standard_normal(shape) for shape in ((5, 3), (2, 4), (1, 1))]
    tensors = [torch.from_numpy(G.copy()) for G in Gs]
    answers = oracle(tensors, [1.0] * 3, [oracle.init_state(x, i) for i, x in enumerate(tensors)], 0)
    for expected, answer in zip(PRODUCTS[product].lmo(Gs), answers, strict=True):
        np.testing.assert_allclose(torch.outer(answer.u, answer.v).numpy(), expected, atol=1e-9)


def length(xs):
    """‖x‖₂ of several matrices."""
    return math.sqrt(sum((x**2).sum() for x in xs))


# Theorem 4.3


@given(products, shapes_of_several, seeds, smoothness, radii, st.floats(1e-3, 1))
def test_descent_inequality_of_several_matrices(product, shapes, seed, L, rho, gamma_L):
    rng, product = np.random.default_rng(seed), PRODUCTS[product]
    Ds, gamma = [rng.standard_normal(shape) for shape in shapes], gamma_L / L
    Gs = [L * D for D in Ds]
    after = [D - gamma * L * (D + rho * epsilon) for D, epsilon in zip(Ds, product.lmo(Gs), strict=True)]
    gap = L / 2 * length(Ds) ** 2
    arguments = gap, product.dual_norm(Gs), gamma, rho, L, product.xi_star(shapes)
    assert below(L / 2 * length(after) ** 2, repaired_descent_bound(*arguments), gap + L * rho**2 * len(shapes))
    assert repaired_descent_bound(*arguments) <= descent_bound(*arguments)


def test_counterexample_descent_inequality_of_several_matrices_with_the_xi_star_of_one():
    """f = ‖x‖²/2 of two 1×1 matrices at (1, 1), γ = ρ = 1: νSAM moves both, to (−1, −1)."""
    ones = [np.ones((1, 1))] * 2
    epsilons = PRODUCTS["νSAM"].lmo(ones)
    after = [x - (x + epsilon) for x, epsilon in zip(ones, epsilons, strict=True)]
    assert length(after) ** 2 / 2 == pytest.approx(1)
    assert descent_bound(1, 2, gamma=1, rho=1, L=1, xi_star=PRODUCTS["νSAM"].xi_star([(1, 1)] * 2)) == pytest.approx(1)
    assert descent_bound(1, 2, gamma=1, rho=1, L=1, xi_star=1) == 1 / 2


@given(balls, sizes, sizes, seeds, smoothness, radii, st.floats(1e-3, 1))
def test_descent_inequality_for_steps_of_at_most_one_over_L(ball, n, m, seed, L, rho, gamma_L):
    D, gamma = np.random.default_rng(seed).standard_normal((n, m)), gamma_L / L
    gap, G = quadratic(L, D)
    after, _ = quadratic(L, step(ball, D, gamma, rho, L))
    arguments = gap, BALLS[ball].dual_norm(G), gamma, rho, L, BALLS[ball].xi_star(n, m)
    assert below(after, descent_bound(*arguments), gap + L * rho**2)
    assert repaired_descent_bound(*arguments) <= descent_bound(*arguments)


@given(balls, sizes, sizes, seeds, smoothness, radii, st.floats(1e-3, 4))
def test_repaired_descent_inequality_for_every_step(ball, n, m, seed, L, rho, gamma_L):
    D, gamma = np.random.default_rng(seed).standard_normal((n, m)), gamma_L / L
    gap, G = quadratic(L, D)
    after, _ = quadratic(L, step(ball, D, gamma, rho, L))
    bound = repaired_descent_bound(gap, BALLS[ball].dual_norm(G), gamma, rho, L, BALLS[ball].xi_star(n, m))
    scale = gap + L * rho**2 * n * m
    assert below(after, bound, 20 * scale)
    if ball in ("ℓ2", "nuclear"):
        assert after == pytest.approx(bound, abs=1e-9 * scale)


@given(balls, sizes, sizes, seeds, smoothness, st.floats(0.01, 10), st.integers(1, 150))
def test_rate_of_constant_steps(ball, n, m, seed, L, rho, K):
    D = np.random.default_rng(seed).standard_normal((n, m))
    gap, _ = quadratic(L, D)
    gamma, bound = rate_bound(gap, K, rho, L, BALLS[ball].xi_star(n, m), BALLS[ball].xi(n, m))
    assume(gamma > 0)
    gaps = [gap]
    for _ in range(K):
        D = step(ball, D, gamma, rho, L)
        gaps.append(quadratic(L, D)[0])
    assert below(min(gaps), bound, 1e-3 * gap)


def test_counterexample_descent_inequality_for_longer_steps():
    """Claimed for every γ > 0: f = x²/2 from x = 1 with γ = 3/2, not even perturbed, goes to x = −1/2."""
    one = np.ones((1, 1))
    x = step("ℓ2", one, gamma=1.5, rho=0, L=1)
    assert x == -0.5
    assert quadratic(1, x)[0] == 1 / 8
    assert descent_bound(1 / 2, 1, gamma=1.5, rho=0, L=1, xi_star=1) == -1 / 4
    assert repaired_descent_bound(1 / 2, 1, gamma=1.5, rho=0, L=1, xi_star=1) == 1 / 8


def test_counterexample_descent_inequality_with_xi_for_xi_star():
    """Section 4 prints ξ², Appendix B ξ_*²: f = ‖x‖²/2 from x = (1, 1) in the ℓ∞ ball with γ = ρ = 1."""
    x = step("ℓ∞", np.ones((1, 2)), gamma=1, rho=1, L=1)
    np.testing.assert_array_equal(x, [[-1, -1]])
    assert quadratic(1, x)[0] == 1
    xi_star, xi = BALLS["ℓ∞"].xi_star(1, 2), BALLS["ℓ∞"].xi(1, 2)
    assert descent_bound(1, 2, gamma=1, rho=1, L=1, xi_star=xi_star) == pytest.approx(1)
    assert descent_bound(1, 2, gamma=1, rho=1, L=1, xi_star=xi) == 1 / 2


def test_counterexample_printed_pl_condition():
    """The proof prints f − f* ≤ μ/2·‖∇f‖²; it is 1/(2μ), an equality here: f = x²/4 at x = 1."""
    gap, G = quadratic(0.5, np.ones((1, 1)))
    assert gap == 1 / 4 > 0.5 / 2 * G.item() ** 2 == 1 / 16
    assert gap == G.item() ** 2 / (2 * 0.5)


# Theorem 4.6


@given(
    st.sampled_from(["log cosh", "cosine"]),
    st.sampled_from([*sorted(BALLS), "random", "descent"]),
    sizes,
    sizes,
    seeds,
    st.floats(0.1, 3),
    st.integers(1, 40),
)
def test_stationarity_for_any_bounded_perturbation(function, perturbation, n, m, seed, t, K):
    """f = Σ log cosh(t·x), or the nonconvex Σ (1 − cos(t·x)); steps up to 2/L."""
    rng = np.random.default_rng(seed)
    L, G_max = t**2, t * math.sqrt(n * m)
    gradient = (lambda X: t * np.tanh(t * X)) if function == "log cosh" else (lambda X: t * np.sin(t * X))
    value = (
        (lambda X: np.log(np.cosh(t * X)).sum()) if function == "log cosh" else (lambda X: (1 - np.cos(t * X)).sum())
    )
    X = 2 * rng.standard_normal((n, m))
    gap = float(value(X))
    gammas, rhos = rng.uniform(0.01, 1.99, K) / L, rng.uniform(0, 2, K)
    xi = BALLS[perturbation].xi_star(n, m) if perturbation in BALLS else 1.0
    squares = []
    for gamma, rho in zip(gammas, rhos, strict=True):
        G = gradient(X)
        squares.append(float((G**2).sum()))
        if perturbation in BALLS:
            epsilon = BALLS[perturbation].lmo(G)
        else:
            epsilon = rng.standard_normal((n, m)) if perturbation == "random" else -G
            epsilon /= np.linalg.norm(epsilon)
        X = X - gamma * gradient(X + rho * epsilon)
    assert min(squares) <= stationarity_bound(gap, gammas.tolist(), rhos.tolist(), L, G_max, xi) * (1 + 1e-10)


@given(st.floats(1e-3, 1e3), st.integers(1, 10**6), smoothness, st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_the_rate_of_constant_steps_and_radius_follows_from_the_bound(gap, K, L, G, xi):
    gamma, rho, rate = stationarity_rate(gap, K, L, G, xi)
    assert 0 < gamma < 2 / L
    steps = min(K, 1000)  # the bound is linear in the number of equal steps but for gap
    bound = stationarity_bound(gap * steps / K, [gamma] * steps, [rho] * steps, L, G, xi)
    assert bound <= rate * (1 + 1e-9)


@pytest.mark.parametrize("perturbation", ["nuclear", "ℓ2", "random"])
def test_the_rate_of_constant_steps_and_radius_holds_on_a_nonconvex_function(perturbation):
    """f = Σ(1 − cos x) of 3×2 matrices: L = 1, ‖∇f‖₂ ≤ √6."""
    for K in (1, 10, 100, 1000):
        rng = np.random.default_rng(K)
        X = 2 * rng.standard_normal((3, 2))
        gamma, rho, rate = stationarity_rate(float((1 - np.cos(X)).sum()), K, L=1, G=math.sqrt(6), xi=1)
        squares = []
        for _ in range(K):
            G = np.sin(X)
            squares.append(float((G**2).sum()))
            draw = rng.standard_normal((3, 2))
            epsilon = draw / np.linalg.norm(draw) if perturbation == "random" else BALLS[perturbation].lmo(G)
            X = X - gamma * np.sin(X + rho * epsilon)
        assert min(squares) <= rate


def test_counterexample_the_rate_without_L():
    """f = L/2·x² from x = 1 with L = 10⁶ and ρ as small as one likes: Δ₀ without L does not bound ‖∇f‖² = L²."""
    L, gap, K = 1e6, 5e5, 4
    gamma, _, rate = stationarity_rate(gap, K, L, G=0, xi=0)
    x, squares = 1.0, []
    for _ in range(K):
        squares.append((L * x) ** 2)
        x -= gamma * L * x
    assert 2 * gap / math.sqrt(K) < min(squares) <= rate


def test_counterexample_stationarity_with_a_norm_other_than_l2():
    """‖ε‖ ≤ ξ must mean ‖ε‖₂: ε = (1, 1, 1, 1) has maximum norm 1, and x = −ε never moves.

    f is ‖x‖²/2 within ‖x‖₂ ≤ 2 and linear outside, so that L = 1 and ‖∇f‖₂ ≤ 2.
    """
    x, epsilon, gammas, rhos = -np.ones(4), np.ones(4), [0.1] * 1000, [1.0] * 1000
    assert not (x + epsilon).any()  # so ∇f(x̃) = 0, and x⁺ = x
    assert (x**2).sum() == 4 > stationarity_bound(2, gammas, rhos, L=1, G=2, xi=1)
    assert stationarity_bound(2, gammas, rhos, L=1, G=2, xi=2) >= 4


# Others' theorems


def test_gauss_sam_looks_flat_for_a_hundred_steps_at_ten_times_the_distance():
    """What a short run of the figure's kind shows: the start is the minimum, though the expectation falls."""
    far = Setting(rho=10.0, distance=1.0, steps=100, seeds=200)
    least = simulate("GaussSAM", far).least
    assert (least[-1] == least[0]).mean() > 0.7
    _, expected = expected_gauss_sam(replace(far, steps=10_000), 1.0)
    assert expected[-1] < 0.05


def asymmetric(x):
    """The slope of x²/2 where x > 0, of 2x² elsewhere."""
    return np.where(x > 0, x, 4 * x)


def test_gauss_sam_stays_in_a_neighbourhood_where_the_mean_over_the_noise_has_another_minimum():
    """Of an asymmetric f, x = 0.6ρ makes the slopes at x + ρ and x − ρ cancel: so far from 0 it stays for good."""
    rng, rho, x = np.random.default_rng(0), 0.1, np.ones(2000)
    for k in range(1, 3000):
        x = x - 0.5 / k**0.9 * asymmetric(x + rho * rng.choice([-1.0, 1.0], x.shape))
    assert x.mean() == pytest.approx(0.6 * rho, rel=0.05)


@pytest.mark.parametrize(("falls", "left"), [(False, 0.5), (True, 0.0)], ids=["fixed ρ", "falling ρ"])
def test_samples_keep_a_fixed_radius_from_the_solution(falls, left):
    """Si & Yun: f_1 = (x + 3)²/2 and f_2 = 3(x − 1)²/2, drawn by turns at random, have their mean's minimum at 0.

    There the slopes are 3 and −3, so that ε is +ρ in one and −ρ in the other, and curvature 3 outweighs 1: x tends
    to ρ/2. It tends to 0 if ρ falls too (Nam et al.). One dimension: SAM's ball is νSAM's.
    """
    rng, x, radius = np.random.default_rng(0), np.ones(2000), 0.2
    for k in range(1, 4000):
        first = rng.random(x.shape) < 0.5
        curvature, centre = np.where(first, 1.0, 3.0), np.where(first, -3.0, 1.0)
        rho = radius / math.sqrt(k) if falls else radius
        epsilon = rho * np.sign(curvature * (x - centre))
        x = x - 0.5 / k**0.9 * curvature * (x + epsilon - centre)
    assert x.mean() == pytest.approx(left * radius, abs=0.01)


def test_without_samples_a_fixed_radius_reaches_the_solution():
    """Si & Yun's rate for strongly convex functions, 1/k² of f − f*, is that of Figure 1 for both balls."""
    for method in ("SAM", "νSAM"):
        k, _, envelope = simulate(method, replace(SETTING, steps=20_000))
        assert np.mean(slopes(k, envelope, 1)) == pytest.approx(-2, abs=0.2)
