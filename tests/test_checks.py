"""Bad input gets one clear sentence, and nothing is half-changed."""

import math

import pytest
import torch
from torch import nn

import nusam
from tests.conftest import assert_unperturbed, loss_of, mlp, train_step, weights

NUMBER = "must be a finite number of at least 0, got"
COUNT = "must be a whole number of at least 0, got"


def sgd(model=None):
    return torch.optim.SGD((model or mlp()).parameters(), lr=0.1)


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Identity()])
def test_another_model_than_the_one_that_is_trained_is_refused(other):
    with pytest.raises(ValueError, match=r"model= is a .* that holds no parameter of base_optimizer; pass the module"):
        nusam.NuSAM(sgd(), model=other)


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, nusam.NuSAMNorm])
def test_a_radius_that_float32_can_not_be_multiplied_with_is_refused(kind):
    with pytest.raises(ValueError, match=r"rho must be at most 1e30, .* got 1e\+39"):
        kind(sgd(), rho=1e39)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        *[({"rho": value}, ValueError, f"rho {NUMBER}") for value in (-0.1, math.nan, math.inf, "0.1", None, True)],
        *[({"delay": value}, ValueError, f"delay {COUNT}") for value in (-1, 0.1, "10%", None, True)],
        *[({"seed": value}, ValueError, f"seed {COUNT}") for value in (-1, 0.5, None)],
        ({"power_iterations": 0}, ValueError, "power_iterations must be a whole number of at least 1, got 0"),
        ({"rho_schedule": 0.5}, TypeError, "rho_schedule must map a step to a factor on rho, or be None, got 0.5"),
        ({"model": "vit"}, TypeError, "model must be the torch.nn.Module being trained, or None, got str"),
        ({"ascent": "matrix"}, ValueError, "ascent must be one of 'auto', 'gradient', 'matrix-free', got 'matrix'"),
        ({"placement": "gpu"}, ValueError, "placement must be one of 'auto', 'weights', 'forward', got 'gpu'"),
        ({"m_sam": "yes"}, TypeError, "m_sam must be True, False or the process group that shares ε, got 'yes'"),
        (
            {"ascent": "matrix-free"},
            ValueError,
            "ascent='matrix-free' needs model= to reach the layers; pass the module",
        ),
        ({"placement": "forward"}, ValueError, "placement='forward' needs model= to reach the layers"),
        ({"targets": "frozen"}, ValueError, "targets='frozen' needs model= to reach the layers"),
        ({"targets": "all"}, ValueError, "targets must be one of 'trainable', 'frozen', got 'all'"),
        (
            {"targets": ["0.weight"]},
            ValueError,
            "'0.weight'.; to choose by name pass a predicate ",
        ),
        ({"targets": lambda name, p: True}, ValueError, "A predicate for targets needs model= for the names"),
        ({"m_sam": True}, ValueError, "m_sam=True needs model= to be the module wrapped by DistributedDataParallel"),
    ],
)
def test_a_wrong_argument_is_refused_and_the_base_optimizer_is_as_it_was(options, error, sentence):
    base = sgd()
    with pytest.raises(error, match=sentence) as raised:
        nusam.NuSAM(base, **options)
    assert str(raised.value).count("\n") == 0
    assert str(raised.value).endswith(".")
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        (lambda: torch.optim.AdamW, r"got the class AdamW; construct it first, AdamW\(model.parameters\(\), ...\)"),
        (lambda: mlp().parameters(), "base_optimizer must be a torch.optim.Optimizer, got generator"),
        (lambda: None, "base_optimizer must be a torch.optim.Optimizer, got NoneType"),
        (lambda: torch.optim.Adadelta(mlp().parameters()), "Adadelta has a hyperparameter rho of its own"),
        (lambda: nusam.NuSAM(sgd()), "base_optimizer is a NuSAM, itself a wrapper; wrap its base_optimizer instead"),
        (lambda: torch.optim.LBFGS(mlp().parameters()), "LBFGS evaluates its closure several times a step"),
    ],
)
def test_a_wrong_base_optimizer(base, sentence):
    with pytest.raises(TypeError, match=sentence):
        nusam.NuSAM(base())


def test_a_wrong_lmo():
    for lmo in ("nuclear", nusam.lmo.Nuclear, None):
        with pytest.raises(TypeError, match=r"lmo must be a norm ball from nusam.lmo, such as nusam.lmo.Nuclear\(\)"):
            nusam.SharpnessAware(sgd(), lmo)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: nusam.NuSAM(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)),
            "NuSAM has nothing to perturb: the optimizer holds no trainable 2-D parameter",
        ),
        (
            lambda: nusam.NuSAM(sgd(mlp().requires_grad_(False))),
            "NuSAM has nothing to perturb: the optimizer holds no trainable 2-D parameter",
        ),
        (
            lambda: nusam.SAM(sgd(mlp().requires_grad_(False))),
            "SAM has nothing to perturb: the optimizer holds no trainable parameter",
        ),
        (
            lambda: nusam.SAMON(sgd(model := nn.Linear(3, 2)), model=model),
            "SAMON has nothing to perturb: the optimizer holds no trainable parameter of a normalization layer",
        ),
        (lambda: nusam.SAMON(sgd()), "SAMON perturbs normalization layers only and needs model= to find them"),
        (
            lambda: nusam.NuSAM(torch.optim.SGD([{"params": mlp().parameters(), "rho": -1.0}], lr=0.1)),
            f"rho {NUMBER} -1.0",
        ),
    ],
)
def test_nothing_to_perturb(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("kind", [nusam.SAM, nusam.SAMON, nusam.GaussSAM])
@pytest.mark.parametrize("options", [{"ascent": "matrix-free"}, {"placement": "forward"}, {"targets": "frozen"}])
def test_options_that_work_on_layers_need_a_rank_one_perturbation(kind, options):
    model = mlp()
    with pytest.raises(ValueError, match=r"needs the rank-one perturbation of NuSAM or NuSAMNorm, got (L2|Gaussian)"):
        kind(sgd(model), model=model, **options)


def test_complex_weights():
    with pytest.raises(TypeError, match="complex64, only real floating point can be perturbed; set its rho to 0"):
        nusam.NuSAM(torch.optim.SGD([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.1))


def test_sparse_gradients_are_refused_before_anything_is_written():
    model = nn.Embedding(5, 3, sparse=True)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)

    def run():
        for _ in opt.passes():
            model(torch.tensor([1, 2])).sum().backward()

    with pytest.raises(TypeError, match="sparse gradient, only dense ones are supported; use sparse=False or rho=0"):
        run()
    assert_unperturbed(model, before, rho=0)


def test_an_added_group_that_is_refused_is_not_added():
    opt = nusam.NuSAM(sgd())
    with pytest.raises(ValueError, match=NUMBER):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "rho": -1.0})
    with pytest.raises(ValueError, match="bfloat16"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("inside", ["ascent", "descent"])
@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("step", lambda opt: opt.step()),
        ("ascent", lambda opt: next(opt.passes())),
        ("ascent", lambda opt: opt.ascent().__enter__()),
        ("descent", lambda opt: opt.descent().__enter__()),
    ],
)
def test_steps_and_passes_inside_a_pass(inside, what, call):
    model = mlp()
    opt = nusam.NuSAM(sgd(model))
    before = weights(model)
    for name in opt.passes():
        loss_of(model).backward()
        if name == inside:
            with pytest.raises(RuntimeError, match=rf"{what}\(\) was called inside the {inside} pass.*leave the pass"):
                call(opt)
    assert_unperturbed(model, before)
    opt.step()


def test_a_descent_without_its_ascent():
    model = mlp()
    opt = nusam.NuSAM(sgd(model))
    sentence = r"descent\(\) was entered without a perturbation; run 'with opt.ascent\(\):'"
    with pytest.raises(RuntimeError, match=sentence), opt.descent():
        pass
    train_step(model, opt)
    with pytest.raises(RuntimeError, match=sentence), opt.descent():  # that of the step before is spent
        pass


@pytest.mark.parametrize("delay", [0, 10])
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM])
def test_a_closure_or_a_body_without_gradients(kind, delay):
    model = mlp()
    opt = kind(sgd(model), delay=delay)
    before = weights(model)
    name = "descent" if delay else "ascent"
    with pytest.raises(RuntimeError, match=rf"The {name} pass ended without any gradient; .* call loss.backward\(\)"):
        opt.step(lambda: loss_of(model))
    with pytest.raises(RuntimeError, match=f"The {name} pass ended without any gradient"):
        for _ in opt.passes():
            loss_of(model)
    assert_unperturbed(model, before, rho=0)
    train_step(model, opt)


def test_gradients_in_the_first_pass_only():
    model = mlp()
    opt = nusam.NuSAM(sgd(model))
    before = weights(model)
    with pytest.raises(RuntimeError, match="The descent pass ended without any gradient"):
        for name in opt.passes():
            if name == "ascent":
                loss_of(model).backward()
    assert_unperturbed(model, before)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None, "1"])
def test_a_schedule_or_a_group_that_goes_wrong_in_mid_training(value):
    model = mlp()
    opt = nusam.NuSAM(sgd(model), rho_schedule=lambda k: value if k == 2 else 1.0)
    train_step(model, opt)
    train_step(model, opt)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"rho_schedule\(2\) {NUMBER}"):
        train_step(model, opt)
    assert_unperturbed(model, before, rho=0)

    opt = nusam.NuSAM(sgd(model))
    opt.param_groups[0]["rho"] = value
    with pytest.raises(ValueError, match=f"rho {NUMBER}"):
        train_step(model, opt)
    opt.param_groups[0]["rho"] = 0.05
    train_step(model, opt)
