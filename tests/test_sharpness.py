"""Sharpness against closed forms, and the model that it leaves as it was."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nusam.tools.sharpness import sharpness
from tests.conftest import batch, loss_of, mlp

F64 = torch.float64


@pytest.fixture(autouse=True)
def _one_thread():
    """More only get in each other's way with problems this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Matrix(nn.Module):
    """One matrix parameter."""

    def __init__(self, n=4, m=3, zero=False):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(n, m, dtype=F64) if zero else torch.randn(n, m, dtype=F64))


def quadratic(eigenvalues, slope=1.0):
    """½xᵀHx + gᵀx of the flattened matrix, H and g."""
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64))
    H = Q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ Q.T
    g = slope * torch.randn(len(eigenvalues), dtype=F64)

    def loss(model):
        x = model.W.flatten()
        return x @ H @ x / 2 + g @ x

    return loss, (H + H.T) / 2, g


def secular_maximum(H, c, rho):
    """max ½εᵀHε + cᵀε over ‖ε‖ ≤ ρ: on the sphere ε = (λI − H)⁻¹c with λ ≥ λmax; inside, H is negative definite."""
    d, Q = torch.linalg.eigh(H)
    a = Q.T @ c
    if d[-1] < 0 and torch.linalg.vector_norm(a / -d) <= rho:
        return float((a.square() / -d).sum() / 2)
    low, high = max(float(d[-1]), 0.0), float(d[-1].abs() + torch.linalg.vector_norm(a) / rho) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.linalg.vector_norm(a / (middle - d)) > rho else (low, middle)
    e = a / (high - d)
    return float((d * e.square()).sum() / 2 + a @ e)


SPECTRA = {
    "convex": [0.1 * i for i in range(11)] + [4.0],
    "indefinite": [-2.0, -1.0, 0.5] + [0.1 * i for i in range(8)] + [3.0],
    "concave": [-0.1 * i for i in range(1, 12)] + [-3.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rho", [0.05, 0.7, 5.0])
def test_a_quadratics_increase_approaches_its_true_maximum(spectrum, rho):
    loss, H, g = quadratic(SPECTRA[spectrum])
    model = Matrix()
    gradient = H @ model.W.detach().flatten() + g
    truth = secular_maximum(H, gradient, rho)
    found = sharpness(model, loss, rho, steps=100)
    assert 0.99 * truth <= found.l2 <= truth * (1 + 1e-9)
    assert 0 < found.nuclear <= truth * (1 + 1e-9)  # the nuclear ball is inside the Frobenius ball
    few = sharpness(model, loss, rho, steps=2)
    assert 0 < few.l2 <= found.l2 + 1e-12


def test_the_secular_equation_agrees_with_brute_force():
    _, H, c = quadratic([-1.0, 2.0])
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=F64)
    points = 0.7 * torch.stack([angles.cos(), angles.sin()])
    best = ((points * (H @ points)).sum(0) / 2 + c @ points).max()
    assert secular_maximum(H, c, 0.7) == pytest.approx(float(best), rel=1e-8)


@pytest.mark.parametrize("spectrum", [SPECTRA["convex"], SPECTRA["indefinite"]])
def test_the_hessians_top_eigenvalue(spectrum):
    loss, H, _ = quadratic(spectrum)
    found = sharpness(Matrix(), loss, hessian_iterations=100)
    assert found.hessian == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-9)


def test_a_dominant_negative_eigenvalue_keeps_its_sign():
    loss, H, _ = quadratic(SPECTRA["concave"])
    assert sharpness(Matrix(), loss).hessian == pytest.approx(float(torch.linalg.eigvalsh(H)[0]), rel=1e-3)


def test_the_hessian_of_a_network_with_attention():
    layer = nn.TransformerEncoderLayer(4, 2, 2, dropout=0.0, batch_first=True, dtype=F64)
    x = torch.randn(2, 3, 4, dtype=F64)

    def loss(model):
        return model(x)[..., 0].square().mean()

    names = [name for name, _ in layer.named_parameters()]
    shapes = [p.shape for p in layer.parameters()]

    def of_vector(vector):
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        parts = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(layer, parts, (x,))[..., 0].square().mean()

    vector = torch.cat([p.detach().flatten() for p in layer.parameters()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_vector, vector))
    found = sharpness(layer, loss, hessian_iterations=100).hessian
    assert found == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=1e-3)


def test_a_linear_loss_grows_by_rho_times_the_dual_norms():
    G, H = torch.randn(6, 4, dtype=F64), torch.randn(4, 6, dtype=F64)
    model = nn.ParameterDict(
        {"W": torch.randn(6, 4, dtype=F64), "V": torch.randn(4, 6, dtype=F64), "b": torch.randn(3, dtype=F64)}
    )

    def loss(model):
        return (G * model["W"]).sum() + (H * model["V"]).sum() + model["b"].sum()

    found = sharpness(model, loss, rho=0.3, steps=5)
    assert found.l2 == pytest.approx(0.3 * math.sqrt(float(G.square().sum() + H.square().sum() + 3)), rel=1e-10)
    top = sum(float(torch.linalg.svd(A).S[0]) for A in (G, H))
    assert found.nuclear == pytest.approx(0.3 * top, rel=1e-8)
    assert found.hessian == 0
    assert found.loss == loss(model).item()


def test_at_a_minimum_the_way_up_is_found_without_a_gradient():
    loss, _, _ = quadratic(SPECTRA["convex"], slope=0.0)
    found = sharpness(Matrix(zero=True), loss, rho=0.5, steps=60)
    assert found.l2 == pytest.approx(4.0 * 0.5**2 / 2, rel=1e-3)
    assert 0 < found.nuclear <= found.l2


def test_nothing_increases_at_a_maximum_or_with_no_radius():
    loss, _, _ = quadratic([-1.0] * 12, slope=0.0)
    found = sharpness(Matrix(zero=True), loss)
    assert (found.l2, found.nuclear) == (0, 0)
    found = sharpness(mlp(), loss_of, rho=0.0)
    assert (found.l2, found.nuclear) == (0, 0)


def test_frozen_parameters_stay_and_unused_ones_do_not_matter():
    model = mlp(F64)
    model.unused = nn.Linear(2, 2, dtype=F64)
    whole = sharpness(model, lambda m: loss_of(m[:4]))
    model[0].weight.requires_grad_(False)
    part = sharpness(model, lambda m: loss_of(m[:4]))
    assert 0 < part.l2 < whole.l2
    assert 0 < part.nuclear < whole.nuclear
    vectors = nn.LayerNorm(6)
    assert sharpness(vectors, lambda m: m(batch()[0]).square().mean()).nuclear == 0


def test_a_diverged_model_is_not_a_number():
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(math.nan)
    found = sharpness(model, loss_of)
    assert all(math.isnan(value) for value in (found.loss, found.l2, found.nuclear, found.hessian))


def test_the_hessian_can_be_left_out():
    found = sharpness(mlp(), loss_of, hessian_iterations=0)
    assert math.isnan(found.hessian)
    assert found.l2 > 0


def test_the_same_seed_finds_the_same():
    model = mlp()
    found = sharpness(model, loss_of, seed=3)
    assert found == sharpness(model, loss_of, seed=3)
    assert found.hessian != sharpness(model, loss_of, seed=4, hessian_iterations=2).hessian
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.loss = 0.0


class Everything(nn.Module):
    """Batch norm, instance norm, dropout, a frozen matrix, a buffer that every forward changes or replaces."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.replaced = torch.rand(2)
        x = self.dropout(self.batch_norm(self.first(x)).relu())
        return self.frozen(self.head(x))


def everything_of(model):
    """Every bit that a measurement could leave behind."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "settings": [module.__dict__.get("track_running_stats") for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, old in before["tensors"].items():
        new = after["tensors"][name]
        assert new.dtype == old.dtype
        assert torch.equal(new.reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8)), name
    for (old_id, old), (new_id, new) in zip(before["gradients"], after["gradients"], strict=True):
        assert old_id == new_id
        assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(before["random"], after["random"])
    for key in ("identities", "requires_grad", "modes", "settings"):
        assert before[key] == after[key], key


def prepared():
    model = Everything()
    model.head.eval()
    loss_of(model).backward()
    model.first.bias.grad = None
    return model


@pytest.mark.parametrize("gradients_enabled", [True, False])
def test_everything_is_left_as_it_was(gradients_enabled):
    model = prepared()
    before = everything_of(model)
    with torch.set_grad_enabled(gradients_enabled):
        found = sharpness(model, loss_of, rho=0.1)
    assert found.l2 > 0
    assert found.nuclear > 0
    assert_same(before, everything_of(model))


@pytest.mark.parametrize("call", range(1, 13))
def test_everything_is_left_as_it_was_after_an_exception(call):
    model = prepared()
    before = everything_of(model)
    calls = 0

    def loss(model):
        nonlocal calls
        calls += 1
        value = loss_of(model)
        if calls == call:
            model.eval().requires_grad_(True)
            value.backward()
            raise KeyboardInterrupt if call % 2 else RuntimeError("no more")
        return value

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        sharpness(model, loss, steps=5)  # 1 + 5 + 5 + 1 evaluations
    assert_same(before, everything_of(model))


def test_dropout_draws_the_same_masks_in_every_evaluation():
    model, seen = prepared(), []

    def loss(model):
        seen.append(nn.functional.dropout(torch.ones(100)))
        return loss_of(model)

    sharpness(model, loss)
    assert len(seen) == 12
    assert all(torch.equal(mask, seen[0]) for mask in seen)


def test_the_loss_is_that_of_the_mode_the_model_is_in():
    model = prepared()
    torch.manual_seed(5)
    expected = float(loss_of(copy.deepcopy(model)).detach())
    torch.manual_seed(5)
    assert sharpness(model, loss_of).loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used_before", [False, True])
def test_an_autocast_around_it_is_one_inside_the_loss(dtype, used_before):
    """Neither does the loss go on with cast weights of before, nor do the measurement's own products get cast."""
    model = mlp()

    def inside(model):
        with torch.autocast("cpu", dtype):
            return loss_of(model)

    expected = sharpness(model, inside, rho=0.5)
    assert min(expected.l2, expected.nuclear) > 0.01
    with torch.autocast("cpu", dtype):
        if used_before:
            loss_of(model)
        assert sharpness(model, loss_of, rho=0.5) == expected


class Doubled(torch.autograd.Function):
    """2·module(x), whose backward runs one of its own: what re-entrant checkpoints of other libraries do."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        return 2 * module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = 2 * ctx.module(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def reentrant(module, x):
    return 2 * checkpoint(module, x, use_reentrant=True)


@pytest.mark.parametrize("apply", [reentrant, Doubled.apply])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_backwards_inside_the_backward_are_seen(apply, shared, where):
    """With ``shared``, a weight in there is used outside too: a part of its gradient would look like all of it."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, outer = torch.randn(8, 5, dtype=F64), torch.ones((), dtype=F64, requires_grad=True)
    outer.grad = torch.full((), 3.0, dtype=F64)
    stepped = []
    model[0].weight.register_post_accumulate_grad_hook(stepped.append)
    kept = model[2].weight.grad = torch.ones(3, 7, dtype=F64)

    def loss(model, through):
        z = outer * x
        if where == "all":
            z = through(model, z)
        elif where == "first":
            z = model[2](through(model[:2], z))
        else:
            z = through(model[2], model[:2](z))
        return z.square().mean() + (model[0].weight.pow(3).sum() if shared else 0)

    expected = sharpness(model, lambda m: loss(m, lambda part, z: 2 * part(z)), rho=0.3, hessian_iterations=0)
    found = sharpness(model, lambda m: loss(m, apply), rho=0.3, hessian_iterations=0)
    assert (found.l2, found.nuclear) == pytest.approx((expected.l2, expected.nuclear), rel=1e-9)
    assert model[2].weight.grad is kept
    assert outer.grad == 3.0
    assert torch.equal(kept, torch.ones_like(kept))
    assert not stepped
    model.zero_grad()
    loss(model, apply).backward()
    assert stepped  # the hooks are there again
    before = everything_of(model)
    with pytest.raises(NotImplementedError, match=r"another backward inside .* hessian_iterations=0\.$"):
        sharpness(model, lambda m: loss(m, apply))
    assert_same(before, everything_of(model))


def test_a_sparse_gradient_is_a_gradient():
    table, rows = torch.randn(10, 3, dtype=F64), torch.randint(0, 10, (4, 3))
    found = [
        sharpness(nn.Embedding(10, 3, sparse=sparse, _weight=table.clone()), lambda m: m(rows).pow(3).mean())
        for sparse in (False, True)
    ]
    assert found[1].l2 > 0
    assert dataclasses.astuple(found[1]) == pytest.approx(dataclasses.astuple(found[0]), rel=1e-9)


@pytest.mark.parametrize("kind", ["embedding bag", "once differentiable"])
def test_an_operation_without_a_second_derivative_says_how_to_leave_it_out(kind):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    if kind == "embedding bag":
        rows = torch.randint(0, 10, (4, 3))
        given = (nn.EmbeddingBag(10, 3), lambda m: m(rows).square().mean())
    else:
        given = (mlp(), lambda m: loss_of(m) + Once.apply(m[0].weight).square().sum())
    with pytest.raises(NotImplementedError, match=r"no second derivative of the loss .* hessian_iterations=0\.$"):
        sharpness(*given)
    assert sharpness(*given, hessian_iterations=0).l2 > 0


def complex_linear():
    return nn.Linear(2, 2, dtype=torch.complex64)


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("error", "sentence", "make"),
    [
        (NotImplementedError, "real weights, got a torch.complex64 one of shape (2, 2)", complex_linear),
        (ValueError, "on the meta device", lambda: nn.Linear(2, 2, device="meta")),
        (ValueError, "has a lazy layer, not shaped yet", lambda: nn.LazyLinear(2)),
        (RuntimeError, "torch.inference_mode() rules out", made_in_inference_mode),
        (TypeError, "got the class Linear; pass the network itself.", lambda: nn.Linear),
        (TypeError, "got list; pass the network itself.", lambda: [nn.Linear(2, 2)]),
    ],
)
def test_models_that_can_not_be_measured_get_one_sentence(error, sentence, make):
    with pytest.raises(error, match=re.escape(sentence)) as raised:
        sharpness(make(), lambda model: model(torch.ones(2)).sum())
    assert "\n" not in str(raised.value)


def test_inference_mode_is_refused_by_its_name():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape("torch.inference_mode() rules out")):
        sharpness(mlp(), loss_of)


@pytest.mark.parametrize(
    ("error", "sentence", "arguments"),
    [
        (TypeError, "model must be a torch.nn.Module, got int; pass the network itself.", {"model": 3}),
        (TypeError, "loss must be a function of the model, got float; pass lambda model: <its loss>.", {"loss": 1.0}),
        (TypeError, "loss must be a function of the model, got a CrossEntropyLoss", {"loss": nn.CrossEntropyLoss()}),
        (
            TypeError,
            "loss must be a function of the model, got one that takes others: missing",
            {"loss": lambda m, x: m(x)},
        ),
        (TypeError, "loss must return a 0-d tensor, got float; return the loss itself.", {"loss": lambda m: 1.0}),
        (
            ValueError,
            "loss must return a 0-d tensor, got one of shape (16, 4); return its mean or its sum.",
            {"loss": lambda m: m(batch()[0])},
        ),
        (ValueError, "loss returned a tensor without a gradient", {"loss": lambda m: loss_of(m).detach()}),
        (ValueError, "rho must be a finite number of at least 0, got -1.", {"rho": -1}),
        (ValueError, "rho must be a finite number of at least 0, got nan.", {"rho": math.nan}),
        (ValueError, "steps must be a whole number of at least 1, got 0.", {"steps": 0}),
        (ValueError, "hessian_iterations must be a whole number of at least 0, got 1.5.", {"hessian_iterations": 1.5}),
        (ValueError, "seed must be a whole number of at least 0, got -1.", {"seed": -1}),
        (
            ValueError,
            "The model has no trainable parameter to displace; set requires_grad on some.",
            {"model": nn.Linear(2, 2).requires_grad_(False)},
        ),
    ],
)
def test_bad_arguments_get_one_sentence(error, sentence, arguments):
    with pytest.raises(error, match=re.escape(sentence)) as raised:
        sharpness(**{"model": mlp(), "loss": loss_of, **arguments})
    assert "\n" not in str(raised.value)
