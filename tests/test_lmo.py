"""Every ball's ε maximizes ⟨G, ·⟩ over the ball, attains the dual norm, and survives dead gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nusam.lmo import L2, Dense, Gaussian, Linf, Nuclear, NuclearNormalized, RankOne, Spectral
from nusam.placement.in_weights import in_weights

SHAPES = [(1, 1), (3, 5), (12, 4), (2, 30)]
RHO = 0.3


def nuclear_norm(X):
    return torch.linalg.svdvals(X).sum()


def spectral_norm(X):
    return torch.linalg.svdvals(X).max()


# ball → (norm of a list of matrices, dual norm): the ball is {Z : norm(Z) ≤ ρ}
BALLS = {
    Nuclear: (lambda Z: max(map(nuclear_norm, Z)), lambda G: sum(map(spectral_norm, G))),
    NuclearNormalized: (
        lambda Z: math.sqrt(sum(nuclear_norm(X) ** 2 for X in Z)),
        lambda G: math.sqrt(sum(spectral_norm(X) ** 2 for X in G)),
    ),
    L2: (lambda Z: math.sqrt(sum((X**2).sum() for X in Z)), lambda G: math.sqrt(sum((X**2).sum() for X in G))),
    Linf: (lambda Z: max(X.abs().max() for X in Z), lambda G: sum(X.abs().sum() for X in G)),
    Spectral: (lambda Z: max(map(spectral_norm, Z)), lambda G: sum(map(nuclear_norm, G))),
}


def ball_of(kind):
    return kind(power_iterations=400) if issubclass(kind, Nuclear) else kind()


def perturb(lmo, gradients, rho=RHO, seed=0):
    """ε of every gradient as a full matrix, and what the ball returned."""
    states = [lmo.init_state(G, i) for i, G in enumerate(gradients)]
    perturbations = lmo([G.clone() for G in gradients], [rho] * len(gradients), states, seed)
    return [e.epsilon if isinstance(e, Dense) else torch.outer(e.u, e.v) for e in perturbations], perturbations


def inner(G, Z):
    return sum((X.double() * Y.double()).sum() for X, Y in zip(G, Z, strict=True))


def with_gap(shape, generator):
    """A random matrix whose top singular value stands out, so that the power iteration converges."""
    U, S, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    S[1:] = S[1:].clamp(max=S[0] / 1.1)
    return U * S @ Vh


@pytest.mark.parametrize("kind", BALLS, ids=lambda kind: kind.__name__)
def test_epsilon_beats_a_thousand_random_points_of_its_ball_and_attains_the_dual_norm(kind):
    norm, dual = BALLS[kind]
    generator = torch.Generator().manual_seed(1)
    G = [with_gap(shape, generator) for shape in SHAPES]
    epsilon, _ = perturb(ball_of(kind), G)
    assert norm(epsilon) <= RHO * (1 + 1e-9)
    attained = inner(G, epsilon)
    torch.testing.assert_close(attained, torch.as_tensor(RHO * dual(G), dtype=torch.float64), rtol=1e-8, atol=0)
    for k in range(1000):
        # half of the points near the maximizer, half anywhere; random ranks, pulled onto the sphere
        Z = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        if k % 2:
            Z = [e + 0.1 * torch.linalg.vector_norm(e) * z for e, z in zip(epsilon, Z, strict=True)]
        if k % 3 == 0:
            Z = [torch.outer(z[:, 0], z[0]) for z in Z]
        radius = RHO / norm(Z)
        assert attained >= inner(G, [z * radius for z in Z]) * (1 - 1e-9)


@given(seed=st.integers(0, 2**20), shape=st.sampled_from([(1, 1), (8, 3), (3, 8), (50, 20)]))
def test_lemma_3_1_the_nuclear_ball_attains_rho_sigma_1(seed, shape):
    G = with_gap(shape, torch.Generator().manual_seed(seed))
    (epsilon,), (perturbation,) = perturb(Nuclear(power_iterations=400), [G])
    sigma = torch.linalg.svdvals(G)[0]
    torch.testing.assert_close(inner([G], [epsilon]), RHO * sigma, rtol=1e-8, atol=0)
    torch.testing.assert_close(perturbation.sigma, sigma, rtol=1e-8, atol=0)
    torch.testing.assert_close(nuclear_norm(epsilon), torch.tensor(RHO, dtype=torch.float64))
    torch.testing.assert_close(perturbation.norm, torch.tensor(RHO, dtype=torch.float64))


@given(
    kind=st.sampled_from([*BALLS, Gaussian]),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_epsilon_does_not_depend_on_the_gradients_scale(kind, exponent, dtype):
    generator = torch.Generator().manual_seed(2)
    G = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    lmo = kind()
    plain, _ = perturb(lmo, G)
    scaled, _ = perturb(lmo, [X * 2.0 ** (exponent * 3) for X in G])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(plain, scaled, strict=True):
        assert torch.linalg.vector_norm(a.double() - b.double()) <= tolerance * torch.linalg.vector_norm(a.double())


@pytest.mark.parametrize("kind", [*BALLS, Gaussian], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("poison", [0.0, math.inf, -math.inf, math.nan])
def test_a_dead_gradient_is_perturbed_by_zero_and_by_nothing_else(kind, poison):
    if kind is Gaussian:
        pytest.skip("ignores the gradient by definition")
    G = [torch.randn(4, 3), torch.randn(2, 5)]
    if poison == 0.0:
        G[0].zero_()
    else:
        G[0][1, 1] = poison
    epsilon, perturbations = perturb(kind(), G)
    assert epsilon[0].count_nonzero() == 0
    assert perturbations[0].norm == 0
    joint = kind is L2 and poison != 0.0  # one radius over all parameters: an unknown norm stops them all
    assert (epsilon[1].count_nonzero() == 0) == joint
    assert all(e.isfinite().all() for e in epsilon)


def test_the_reported_norm_is_the_frobenius_norm_of_epsilon():
    G = [torch.randn(shape) for shape in SHAPES]
    for kind in [*BALLS, Gaussian]:
        epsilon, perturbations = perturb(kind(), G)
        for e, perturbation in zip(epsilon, perturbations, strict=True):
            torch.testing.assert_close(perturbation.norm, torch.linalg.vector_norm(e))


def test_nusam_norm_scales_by_equation_21():
    G = [with_gap(shape, torch.Generator().manual_seed(3)) for shape in SHAPES]
    sigmas = torch.stack([torch.linalg.svdvals(X)[0] for X in G])
    plain, _ = perturb(Nuclear(400), G)
    normalized, _ = perturb(NuclearNormalized(400), G)
    for e, e_norm, sigma in zip(plain, normalized, sigmas, strict=True):
        torch.testing.assert_close(e_norm, e * sigma / torch.linalg.vector_norm(sigmas), rtol=1e-7, atol=1e-12)


def test_gaussian_noise_is_normalized_new_in_every_step_and_its_own():
    G = [torch.zeros(300, 200), torch.zeros(50)]
    before = torch.get_rng_state()
    first, _ = perturb(Gaussian(), G, seed=1)
    again, _ = perturb(Gaussian(), G, seed=1)
    other, _ = perturb(Gaussian(), G, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    flat = torch.cat([e.flatten() for e in first])
    torch.testing.assert_close(torch.linalg.vector_norm(flat), torch.tensor(RHO))
    # ε·√d/ρ is standard normal: mean and kurtosis within five standard errors
    z = flat * math.sqrt(flat.numel()) / RHO
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / z.numel())


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", None])
def test_power_iterations_must_be_a_positive_whole_number(value):
    with pytest.raises(ValueError, match="power_iterations must be a whole number of at least 1, got"):
        Nuclear(value)


def test_one_lmo_returns_one_kind():
    u = torch.ones(2)
    mixed = [RankOne(u, u, u[0], u[0]), Dense(torch.ones(2, 2), u[0])]
    with pytest.raises(TypeError, match="perturbations of one kind"):
        in_weights([torch.zeros(2, 2), torch.zeros(2, 2)], mixed)
