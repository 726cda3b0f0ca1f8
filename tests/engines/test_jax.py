"""The ascent in JAX is torch's, on the same weights and gradients; around optax it takes the steps of Algorithm 1."""

import re
import runpy
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nusam
from nusam import lmo
from nusam.reference import nusam_step

jax = pytest.importorskip("jax", reason="JAX is not installed; pip install 'nusam[jax]'.")
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import nusam.jax as nj  # noqa: E402

ROOT = Path(__file__).parents[2]
sizes = st.integers(1, 6)
RHO, RATE, STEPS = 0.3, 0.1, 20


def epsilon_of(ascent, gradients, state):
    updates, state = ascent.update(gradients, state)
    return {name: -np.asarray(update) for name, update in updates.items()}, state


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 5]),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([1e-18, 1.0, 1e18]),
)
def test_it_is_the_ascent_of_torch(shapes, seed, iterations, dtype, scale):
    rng = np.random.default_rng(seed)
    steps = [{str(i): (scale * rng.standard_normal(s)).astype(dtype) for i, s in enumerate(shapes)} for _ in range(3)]
    ascent, oracle = nj.nuclear(RHO, power_iterations=iterations), lmo.Nuclear(iterations)
    state = ascent.init({name: jnp.asarray(G) for name, G in steps[0].items()})
    states = [{"u": torch.from_numpy(np.array(state.u[f"['{name}']"]))} for name in steps[0]]
    for k, Gs in enumerate(steps):
        epsilons, state = epsilon_of(ascent, {name: jnp.asarray(G) for name, G in Gs.items()}, state)
        expected = oracle([torch.from_numpy(G.copy()) for G in Gs.values()], [RHO] * len(Gs), states, k)
        tolerance = 2e-4 if dtype == "float32" else 1e-9
        for name, answer in zip(Gs, expected, strict=True):
            np.testing.assert_allclose(epsilons[name], torch.outer(answer.u, answer.v).numpy(), atol=tolerance)


def test_many_iterations_find_the_top_pair():
    G = np.random.default_rng(0).standard_normal((7, 4))
    ascent = nj.nuclear(RHO, power_iterations=500)
    epsilons, _ = epsilon_of(ascent, {"W": jnp.asarray(G)}, ascent.init({"W": jnp.asarray(G)}))
    U, _, Vh = np.linalg.svd(G)
    np.testing.assert_allclose(epsilons["W"], RHO * np.outer(U[:, 0], Vh[0]), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_a_gradient_without_a_direction_leaves_the_weights_and_the_warm_start(value):
    params = {"W": jnp.ones((3, 2)), "V": jnp.ones((2, 2))}
    ascent = nj.nuclear(RHO)
    state = ascent.init(params)
    gradients = {"W": jnp.zeros((3, 2)).at[0, 0].set(value), "V": jnp.eye(2)}
    epsilons, after = epsilon_of(ascent, gradients, state)
    assert not epsilons["W"].any()
    assert np.linalg.norm(epsilons["V"]) == pytest.approx(RHO)
    assert (after.u["['W']"] == state.u["['W']"]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e37])
def test_no_scale_is_too_small_or_too_large(scale):
    G = jnp.asarray(np.random.default_rng(0).standard_normal((50, 50)), jnp.float32)
    ascent = nj.nuclear(RHO)
    epsilons, _ = epsilon_of(ascent, {"W": scale * G}, ascent.init({"W": G}))
    expected, _ = epsilon_of(ascent, {"W": G}, ascent.init({"W": G}))
    np.testing.assert_allclose(epsilons["W"], expected["W"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
@pytest.mark.parametrize("base", ["sgd", "adamw", "by norm"])
def test_an_ascent_without_a_direction_leaves_nothing_in_two_calls(value, base):
    """Not in the weights, and not in the base optimizer's state, to which the first call's gradient is shown."""
    bases = {
        "sgd": optax.sgd(RATE, momentum=0.9),
        "adamw": optax.adamw(RATE),
        "by norm": optax.chain(optax.contrib.normalize(), optax.sgd(RATE)),
    }
    params = {"W": jnp.ones((3, 2), jnp.float32), "b": jnp.ones(2, jnp.float32)}
    good = {"W": jnp.asarray([[1.0, 2.0], [0.5, 1.0], [0.0, 1.0]], jnp.float32), "b": jnp.ones(2, jnp.float32)}
    bad = {"W": jnp.full((3, 2), value, jnp.float32), "b": jnp.full(2, value, jnp.float32)}
    optimizer, plain = nj.nusam(bases[base], RHO), bases[base]
    state, plain_state, expected = optimizer.init(params), plain.init(params), params
    for step in range(4):
        before = params
        updates, state = optimizer.update(bad if step == 2 else good, state, params)
        moved = optax.apply_updates(params, updates)
        if step == 2 and not np.isfinite(value):
            assert (moved["W"] == before["W"]).all()
        updates, state = optimizer.update(good, state, moved)
        params = optax.apply_updates(moved, updates)
        updates, plain_state = plain.update(good, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5)


def test_rows_that_the_warm_start_does_not_meet_begin_anew():
    params = {"table": jnp.zeros((50, 4))}
    ascent = nj.nuclear(RHO)
    state = ascent.init(params)
    for row in range(3):
        epsilons, state = epsilon_of(ascent, {"table": params["table"].at[row].set(1.0)}, state)
        expected = np.zeros((50, 4))
        expected[row] = RHO / 2
        np.testing.assert_allclose(epsilons["table"], expected, atol=1e-12)


def network(seed=0):
    """Weights of an MLP with biases, a batch, and its loss in both frameworks."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape) / 2 for shape in ((8, 5), (3, 8))]
    biases = [np.zeros(8), np.zeros(3)]
    batches = [(rng.standard_normal((6, 5)), rng.standard_normal((6, 3))) for _ in range(STEPS)]
    return weights, biases, batches


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["W0"].T + params["b0"])
    return ((hidden @ params["W1"].T + params["b1"] - y) ** 2).mean()


@pytest.mark.parametrize("opaque", [False, True])
def test_twenty_steps_are_algorithm_1s_on_matrices_alone(opaque):
    weights, _, batches = network()
    params = {f"W{i}": jnp.asarray(W) for i, W in enumerate(weights)}

    def own(params, batch):
        return loss(params | {"b0": jnp.zeros(8), "b1": jnp.zeros(3)}, batch)

    optimizer = nj.nusam(optax.sgd(RATE), RHO, opaque_mode=opaque)
    state = optimizer.init(params)
    us = [torch.from_numpy(np.array(state.adv_state.u[f"['W{i}']"])) for i in range(2)]
    Ms = [torch.from_numpy(W) for W in weights]

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(own)(params, batch)
        further = {"grad_fn": jax.grad(lambda params, _: own(params, batch))} if opaque else {}
        updates, state = optimizer.update(gradient, state, params, **further)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        for _ in range(1 if opaque else 2):
            params, state = step(params, state, batch)
        x, y = map(torch.from_numpy, batch)

        def gradients(Ms, x=x, y=y):
            Ms = [M.detach().requires_grad_() for M in Ms]
            value = ((torch.tanh(x @ Ms[0].T) @ Ms[1].T - y) ** 2).mean()
            return list(torch.autograd.grad(value, Ms))

        Ms, us = nusam_step(Ms, us, gradients, RHO, RATE)
    for i, M in enumerate(Ms):
        np.testing.assert_allclose(params[f"W{i}"], M.numpy(), atol=1e-9)
    assert step._cache_size() == 1


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_twenty_steps_equal_those_around_torchs_optimizers(base):
    weights, biases, batches = network(1)
    params = {f"W{i}": jnp.asarray(W) for i, W in enumerate(weights)}
    params |= {f"b{i}": jnp.asarray(b) for i, b in enumerate(biases)}
    bases = {"sgd": optax.sgd(RATE, momentum=0.9), "adamw": optax.adamw(RATE / 10, weight_decay=0.01)}
    optimizer = nj.nusam(bases[base], RHO, power_iterations=300, opaque_mode=True)
    state = optimizer.init(params)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    with torch.no_grad():
        for i, layer in enumerate((model[0], model[2])):
            layer.weight.copy_(torch.from_numpy(weights[i]))
            layer.bias.copy_(torch.from_numpy(biases[i]))
    kinds = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE / 10, weight_decay=0.01),
    }
    opt = nusam.NuSAM(kinds[base](model.parameters()), RHO, power_iterations=300)
    for batch in batches:
        gradient = jax.grad(loss)(params, batch)
        grad_fn = jax.grad(lambda params, _, batch=batch: loss(params, batch))
        updates, state = optimizer.update(gradient, state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        x, y = map(torch.from_numpy, batch)
        for _ in opt.passes():
            ((model(x) - y) ** 2).mean().backward()
        opt.step()
    for i, layer in enumerate((model[0], model[2])):
        np.testing.assert_allclose(params[f"W{i}"], layer.weight.detach().numpy(), atol=1e-9)
        np.testing.assert_allclose(params[f"b{i}"], layer.bias.detach().numpy(), atol=1e-9)


def blocks_of_the_page():
    page = (ROOT / "docs" / "jax.md").read_text("utf-8")
    return [textwrap.dedent(block) for block in re.findall(r'```py title="[^"]*"\n(.*?)```', page, re.DOTALL)]


def test_the_page_runs():
    weights, biases, batches = network(2)
    params = {f"W{i}": jnp.asarray(W) for i, W in enumerate(weights)} | {"b0": biases[0], "b1": biases[1]}
    first, other, scheduled = blocks_of_the_page()
    names = {"params": params, "loss": loss, "batches": batches}
    exec(first, names)
    assert loss(names["params"], batches[0]) < loss(params, batches[0])
    exec(other, names)
    assert names["optimizer"].init({"heads": jnp.ones((4, 2, 3)), "W": jnp.ones((2, 5))}).adv_state.u.keys() == {
        "['heads']",
        "['W']",
    }
    heads = {"query": {"kernel": jnp.ones((8, 2, 3)), "bias": jnp.ones((2, 3))}, "out": {"kernel": jnp.ones((2, 3, 8))}}
    us = names["optimizer"].init(heads).adv_state.u
    assert {path: len(u) for path, u in us.items()} == {"['query']['kernel']": 8, "['out']['kernel']": 6}
    exec(scheduled, names)
    state = names["optimizer"].init(params)
    gradient = jax.grad(lambda moved, _=None: loss(moved, batches[0]))
    for _ in range(2):
        _, state = names["optimizer"].update(gradient(params), state, params, grad_fn=gradient)
    assert float(state.hyperparams["rho"]) == pytest.approx(0.05 / 1000, rel=1e-3)


def test_the_example_learns(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_jax.py", "--epochs", "20"])
    runpy.run_path(str(ROOT / "examples" / "train_jax.py"), run_name="__main__")
    accuracies = re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert float(accuracies[-1]) > 70


def test_leaves_of_other_shapes_are_matrices_if_told():
    params = {"heads": jnp.ones((4, 2, 3)), "kernel": jnp.ones((3, 3, 2, 5)), "scale": jnp.ones(4)}

    def as_matrix(path, leaf):
        return {3: (leaf.shape[0], leaf.size // leaf.shape[0]), 4: (leaf.size // leaf.shape[-1], leaf.shape[-1])}.get(
            leaf.ndim
        )

    ascent = nj.nuclear(RHO, as_matrix=as_matrix)
    epsilons, _ = epsilon_of(ascent, params, ascent.init(params))
    assert {name: e.shape for name, e in epsilons.items()} == {name: p.shape for name, p in params.items()}
    assert np.linalg.norm(epsilons["heads"]) == pytest.approx(RHO)
    assert np.linalg.norm(epsilons["kernel"]) == pytest.approx(RHO)
    assert not epsilons["scale"].any()


def test_half_precision_leaves_are_multiplied_in_single():
    G = np.random.default_rng(0).standard_normal((6, 4)) * 1e-6
    params = {"W": jnp.asarray(G, jnp.bfloat16)}
    ascent = nj.nuclear(RHO)
    state = ascent.init(params)
    assert state.u["['W']"].dtype == jnp.float32
    updates, _ = ascent.update(params, state)
    assert updates["W"].dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(updates["W"], np.float64)) == pytest.approx(RHO, rel=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("opaque", [False, True])
def test_weights_that_would_round_epsilon_away_are_refused(dtype, opaque):
    optimizer = nj.nusam(optax.sgd(RATE), RHO, opaque_mode=opaque)
    with pytest.raises(ValueError, match=r"^\['W'\] is of b?float16, which would round ε away; .*\.$"):
        optimizer.init({"W": jnp.ones((3, 2), dtype), "V": jnp.ones((3, 2))})
    optimizer.init({"b": jnp.ones(3, dtype), "V": jnp.ones((3, 2))})


@pytest.mark.parametrize("cut", [("d", None), (None, "d"), (None, None)])
def test_arrays_of_an_explicit_sharding_have_the_same_epsilon(cut):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    G = np.random.default_rng(0).standard_normal((6, 4))
    with jax.set_mesh(mesh):
        here = {"W": jax.device_put(G, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut)))}
        ascent = nj.nuclear(RHO, power_iterations=40)
        state = ascent.init(here)
        updates, _ = jax.jit(ascent.update)(here, state)
    U, _, Vh = np.linalg.svd(G)
    np.testing.assert_allclose(np.asarray(updates["W"]), -RHO * np.outer(U[:, 0], Vh[0]), atol=1e-6)


def test_a_gradient_of_zeros_divides_by_no_zero():
    with jax.debug_nans(True):
        ascent = nj.nuclear(RHO)
        epsilons, _ = epsilon_of(ascent, {"W": jnp.zeros((3, 2))}, ascent.init({"W": jnp.ones((3, 2))}))
    assert not epsilons["W"].any()


def linear_loss(params, batch):
    x, y = batch
    return ((x @ params["W"] * params["scale"] - y) ** 2).mean()


@pytest.mark.parametrize("rho", [np.float32(RHO), jnp.asarray(RHO), 1])
def test_numbers_of_any_kind_may_be_radii_and_leaves(rho):
    rng = np.random.default_rng(0)
    params = {"W": jnp.asarray(rng.standard_normal((5, 3))), "scale": 2.0}
    batch = rng.standard_normal((6, 5)), rng.standard_normal((6, 3))
    optimizer = nj.nusam(optax.sgd(RATE), rho, power_iterations=40, opaque_mode=True)
    gradient = jax.grad(linear_loss)(params, batch)
    updates, _ = optimizer.update(
        gradient, optimizer.init(params), params, grad_fn=jax.grad(lambda moved, _: linear_loss(moved, batch))
    )
    U, _, Vh = np.linalg.svd(gradient["W"])
    moved = {"W": params["W"] + float(rho) * np.outer(U[:, 0], Vh[0]), "scale": 2.0}
    np.testing.assert_allclose(updates["W"], -RATE * jax.grad(linear_loss)(moved, batch)["W"], rtol=1e-3)


def test_clipping_goes_inside():
    params = {"W": jnp.eye(3, 2)}
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    for opaque in (False, True):
        optimizer = nj.nusam(clipped, RHO, opaque_mode=opaque)
        updates, state = optimizer.update(
            params, optimizer.init(params), params, **({"grad_fn": lambda moved, _: moved} if opaque else {})
        )
        if not opaque:
            moved = optax.apply_updates(params, updates)
            updates, _ = optimizer.update(moved, state, moved)
            updates = jax.tree.map(lambda u, m, p: u + m - p, updates, moved, params)
        assert np.linalg.norm(updates["W"]) == pytest.approx(1e-3, rel=1e-3)


def test_a_schedule_of_the_radius_goes_through_optax():
    build = optax.inject_hyperparams(nj.nusam, static_args=("power_iterations", "as_matrix", "seed", "opaque_mode"))
    params = {"W": jnp.eye(3, 2)}
    optimizer = build(optax.sgd(0.0), lambda k: RHO * (k + 1), opaque_mode=True)
    state, seen = optimizer.init(params), []

    def gradient(moved, _=None):
        seen.append(float(jnp.linalg.norm(moved["W"] - params["W"])))
        return {"W": jnp.ones((3, 2))}

    for _ in range(3):
        _, state = optimizer.update(gradient(params), state, params, grad_fn=gradient)
    np.testing.assert_allclose(seen[1::2], [RHO, 2 * RHO, 3 * RHO], rtol=1e-6)


def test_micro_batches_add_up_inside():
    weights, biases, batches = network()
    params = {f"W{i}": jnp.asarray(W) for i, W in enumerate(weights)} | {"b0": biases[0], "b1": biases[1]}
    optimizer = nj.nusam(optax.MultiSteps(optax.sgd(RATE), 2), RHO, power_iterations=60, opaque_mode=True)
    state, expected = optimizer.init(params), params
    for first, second in zip(batches[:4:2], batches[1:4:2], strict=True):
        mean = jax.tree.map(lambda *g: sum(g) / 2, *[at_epsilon(expected, batch) for batch in (first, second)])
        expected = jax.tree.map(lambda p, g: p - RATE * g, expected, mean)
        for batch in (first, second):
            grad_fn = jax.grad(lambda moved, _, batch=batch: loss(moved, batch))
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, atol=1e-5)


def at_epsilon(params, batch):
    """The gradient at W + ρuvᵀ."""
    moved = dict(params)
    for name, G in jax.grad(loss)(params, batch).items():
        if G.ndim == 2:
            U, _, Vh = np.linalg.svd(G)
            moved[name] = params[name] + RHO * np.outer(U[:, 0], Vh[0])
    return jax.grad(loss)(moved, batch)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nj.nusam(optax.adamw), "optimizer must be one of optax, such as"),
        (lambda: nj.nusam(1e-3), "optimizer must be one of optax, such as"),
        (lambda: nj.nuclear(0.1, as_matrix=(3, 3)), r"as_matrix must be a function .*, got \(3, 3\)\."),
    ],
)
def test_what_is_of_another_kind_is_one_sentence(make, said):
    with pytest.raises(TypeError, match=said):
        make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nj.nuclear(optax.linear_schedule(0.0, 0.1, 5)), "a schedule goes through optax.inject_hyperparams"),
        (lambda: nj.nuclear("0.1"), "rho must be a finite number of at least 0, got '0.1'"),
        (
            lambda: nj.nuclear(0.1, as_matrix=lambda path, leaf: leaf.ndim == 2).init({"b": jnp.ones((3, 2))}),
            r"as_matrix gave True for \['b'\] of shape \(3, 2\)",
        ),
        (lambda: nj.nuclear(-1.0), "rho must be a finite number of at least 0, got -1.0."),
        (lambda: nj.nuclear(float("nan")), "rho must be a finite number of at least 0, got nan."),
        (lambda: nj.nuclear(0.1, power_iterations=0), "power_iterations must be a whole number of at least 1, got 0."),
        (lambda: nj.nuclear(0.1).init({"b": jnp.ones(3)}), "νSAM has nothing to perturb"),
        (
            lambda: nj.nuclear(0.1, as_matrix=lambda path, leaf: (2, 2)).init({"b": jnp.ones(3)}),
            r"as_matrix gave \(2, 2\) for \['b'\] of shape \(3,\)",
        ),
        (
            lambda: nj.nuclear(0.1).update({"V": jnp.ones((2, 2))}, nj.nuclear(0.1).init({"W": jnp.ones((2, 2))})),
            "The gradients hold 1 matrices, and the state 1 others",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()
