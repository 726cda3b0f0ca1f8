"""Algorithm 2 against its printed form in float64, and against a full SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nusam.lmo import Nuclear
from nusam.power_iteration import power_iteration, power_iteration_of_stack
from nusam.reference import svd_top1

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (3, 40), (40, 3), (64, 48), (2000, 30), (30, 2000)]
# (dtype, unit roundoff of the products, exponents of ten that it can hold)
DTYPES = [
    (torch.float64, 1e-10, 30),
    (torch.float32, 1e-5, 30),
    (torch.bfloat16, 1e-5, 30),
    (torch.float16, 1e-5, 2),
]


def matrix(shape, rank, seed, dtype, scale):
    """A random matrix of the given rank in the given dtype; rank None is full."""
    generator = torch.Generator().manual_seed(seed)
    n, m = shape
    if rank is None:
        A = torch.randn(n, m, generator=generator, dtype=torch.float64)
    else:
        A = torch.randn(n, rank, generator=generator, dtype=torch.float64) @ torch.randn(
            rank, m, generator=generator, dtype=torch.float64
        )
    return (A * scale).to(dtype)


def warm_start(A, seed):
    return Nuclear().init_state(A, seed)["u"]


@settings(max_examples=1000)
@given(
    shape=st.sampled_from(SHAPES),
    rank=st.sampled_from([None, 1, 2, 3]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
    iterations=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_agrees_with_algorithm_2_in_float64(shape, rank, dtype, exponent, iterations, seed):
    dtype, tolerance, largest = dtype
    A = matrix(shape, rank, seed, dtype, 10.0 ** (exponent * largest / 30))
    u = warm_start(A, seed)
    (pair,) = power_iteration([A], [u], iterations)
    exact = A.double() / A.double().abs().max()  # its τ is absolute, so the oracle gets a scale of one
    u_exact, v_exact = svd_top1(exact, u.double(), iterations)
    assert pair.alive
    assert torch.linalg.vector_norm(pair.u.double() - u_exact) <= tolerance
    assert torch.linalg.vector_norm(pair.v.double() - v_exact) <= tolerance


@given(
    shape=st.sampled_from(SHAPES),
    ratio=st.floats(1.1, 10),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**20),
)
def test_hundred_iterations_find_the_top_pair_of_the_svd(shape, ratio, dtype, exponent, seed):
    U, S, Vh = torch.linalg.svd(matrix(shape, None, seed, torch.float64, 1.0), full_matrices=False)
    S[1:] = S[1:].clamp(max=S[0] / ratio)  # σ₁/σ₂ ≥ ratio ≥ 1.1
    A = (U * S @ Vh * 10.0**exponent).to(dtype)
    (pair,) = power_iteration([A], [warm_start(A, seed)], 100)
    u, v = U[:, 0], Vh[0]
    sign = torch.sign(pair.u.double() @ u)
    assert torch.linalg.vector_norm(pair.u.double() * sign - u) <= 1e-4
    assert torch.linalg.vector_norm(pair.v.double() * sign - v) <= 1e-4
    torch.testing.assert_close(pair.sigma.double(), S[0] * 10.0**exponent, rtol=1e-4, atol=0)


@pytest.mark.parametrize("poison", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_dead_gradient_leaves_the_warm_start_as_it_was(poison, iterations):
    A = torch.randn(5, 3)
    if poison == 0.0:
        A.zero_()
    else:
        A[2, 1] = poison
    u, healthy = warm_start(A, 0), torch.randn(4, 6)
    dead, alive = power_iteration([A, healthy], [u, warm_start(healthy, 1)], iterations)
    assert torch.equal(dead.u, u)
    assert not dead.alive
    assert dead.v.count_nonzero() == 0
    assert dead.sigma == 0
    assert alive.alive
    assert alive.v.count_nonzero() == 6


# rows of a gradient of rank one, as multiples of one row, and the others that u lives on
MISSED = {
    "a pair that is told apart": ({0: 1.0, 3: -1.0}, {7: 1.0}),
    "bags of two": ({i: 0.5 * (-1.0) ** (i // 2) for i in range(8)}, {9: 1.0}),
    "all rows of one size": ({i: (-1.0) ** i for i in range(10)}, {11: -1.0}),
    "a row": ({4: 3.0}, {5: 1.0, 6: -1.0}),
}


@pytest.mark.parametrize("case", MISSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [12, 3000])
def test_a_gradient_that_misses_its_warm_start_is_found_all_the_same(case, dtype, n):
    multiples, lives = MISSED[case]
    row = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, u = torch.zeros(n, 16, dtype=dtype), torch.zeros(n, dtype=dtype)
    for i, multiple in multiples.items():
        A[i] = multiple * row
    for i, entry in lives.items():
        u[i] = entry
    sigma = torch.linalg.svdvals(A.double())[0]
    found = [*power_iteration([A], [u]), *power_iteration_of_stack(A[None], [u])]
    for pair in found:
        assert pair.alive
        assert float(pair.u.double() @ A.double() @ pair.v.double() / sigma) == pytest.approx(1, abs=1e-4)
        assert float(pair.sigma / sigma) == pytest.approx(1, abs=1e-4)


def test_the_printed_algorithm_dies_on_a_zero_gradient():
    """The deviation is one: Algorithm 2 as printed maps a zero gradient to u = v = 0 for ever."""
    u, _ = svd_top1(torch.zeros(3, 2), torch.ones(3))
    assert u.count_nonzero() == 0
    u, v = svd_top1(torch.randn(3, 2), u)
    assert u.count_nonzero() == v.count_nonzero() == 0


def test_the_printed_tau_is_scale_dependent_and_ours_is_not():
    A = torch.randn(20, 10, dtype=torch.float64)
    u = warm_start(A, 0)
    printed, _ = svd_top1(A * 1e-12, u)
    (ours,) = power_iteration([A * 1e-12], [u])
    exact, _ = svd_top1(A, u)
    assert torch.linalg.vector_norm(printed - exact) > 0.1
    assert torch.linalg.vector_norm(ours.u - exact) < 1e-11


def test_neither_the_matrix_nor_the_warm_start_is_written():
    A, u = torch.randn(4, 3), torch.randn(4)
    copies = A.clone(), u.clone()
    power_iteration([A], [u], 2)
    assert torch.equal(A, copies[0])
    assert torch.equal(u, copies[1])
