"""What a constructor was given may be changed where all of it follows, and else says that it can't."""

import copy
from inspect import signature

import pytest
import torch
from torch import nn

import nusam
from nusam.methods import __all__ as METHODS
from tests.conftest import assert_unperturbed, weights

SETTABLE = {"rho", "delay", "rho_schedule", "ascent_share", "model"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches():
    return torch.randn(6, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Plain:
    """The optimizer, and the passes of one whose step is an engine's."""

    def __init__(self, model, engine, **options):
        self.base = torch.optim.SGD(model.parameters(), lr=0.1)
        self.engine = engine
        self.nusam = nusam.Perturbation(model, **options) if engine else nusam.NuSAM(self.base, model=model, **options)

    def step(self, model, x):
        self.base.zero_grad()
        for part in self.nusam.passes(x):
            model(part).square().mean().backward()
        (self.base if self.engine else self.nusam).step()


CHANGES = {
    "ascent_share": ({}, {"ascent_share": 1 / 4}),
    "back to a whole batch": ({"ascent_share": 1 / 4}, {"ascent_share": 1}),
    "delay": ({"delay": 1}, {"delay": 5}),
    "rho": ({}, {"rho": 0.5}),
    "rho_schedule": ({}, {"rho_schedule": lambda step: 1 / step}),
}


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_steps_is_as_if_it_had_been_given_from_there_on(what, engine):
    first, then = CHANGES[what]
    model = network()
    opt = Plain(model, engine, **first)
    for x in batches()[:3]:
        opt.step(model, x)
    expected = copy.deepcopy(model)
    twin = Plain(expected, engine, **{**first, **then})
    saved = opt.nusam.state_dict()
    twin.nusam.load_state_dict({**saved, "rho": twin.nusam.rho} if engine else saved)
    for name, value in then.items():
        setattr(opt.nusam, name, value)
        assert getattr(opt.nusam, name) == value
        twin.nusam.rho = opt.nusam.rho
    for x in batches()[3:]:
        opt.step(model, x)
        twin.step(expected, x)
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_buffers_follow_a_share_that_came_later():
    model = network()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
    opt.ascent_share = 1 / 4
    seen = []
    model[0].register_forward_hook(lambda module, inputs, y: seen.append(y.detach()))
    for part in opt.passes(batches()[0]):
        model(part).square().mean().backward()
    assert torch.allclose(model[1].running_mean, 0.1 * seen[1].mean(0))


def test_another_module_is_guarded_in_the_place_of_the_first():
    model = network()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
    opt.model = wrapper = nn.Sequential(model)
    for name in opt.passes():
        wrapper(batches()[0]).square().mean().backward()
        if name == "descent":
            with pytest.raises(RuntimeError, match="can't be saved or copied"):
                wrapper.state_dict()
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", -1),
        ("rho", "0.1"),
        ("delay", 0.5),
        ("delay", -1),
        ("rho_schedule", 0.1),
        ("ascent_share", 0),
        ("ascent_share", "1/8"),
        ("model", "model"),
        ("model", None),
        ("model", nn.Linear(2, 2)),
    ],
)
@pytest.mark.parametrize("engine", [False, True])
def test_a_value_that_is_none_changes_nothing(name, value, engine):
    opt = Plain(network(), engine).nusam
    before = getattr(opt, name)
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError)):
        setattr(opt, name, value)
    assert getattr(opt, name) is before or getattr(opt, name) == before


def test_groups_with_radii_of_their_own_keep_them():
    model = network()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[3].parameters()}]
    opt = nusam.NuSAM(torch.optim.SGD(groups, lr=0.1), rho=0.1, model=model)
    with pytest.raises(ValueError, match=r"overwrite the radii of the groups, 0, 0\.1, which differ; set the group"):
        opt.rho = 0.2
    assert [group["rho"] for group in opt.param_groups] == [0.0, 0.1]


@pytest.mark.parametrize("method", [*METHODS, "SharpnessAware", "Perturbation"])
def test_what_all_else_follows_from_is_given_once(method):
    kind, model = getattr(nusam, method), network()
    if method == "Perturbation":
        opt = kind(model)
    elif method == "SharpnessAware":
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), nusam.lmo.L2(), model=model)
    else:
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    given = {*signature(kind).parameters, *signature(nusam.SharpnessAware).parameters} - {"options", "ascent"}
    fixed = (set(signature(kind).parameters) if method == "Perturbation" else given) - SETTABLE - {"options", "ascent"}
    for name in fixed:
        with pytest.raises(AttributeError, match=f"{name} is given once, when {method} is built"):
            setattr(opt, name, 1)


@pytest.mark.parametrize("name", ["ascent", "descent", "passes", "step", "one_pass", "metrics", "state_dict"])
def test_what_loops_call_stays_something_that_can_be_called(name):
    model = network()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for value in ("gradient", None):
        with pytest.raises(AttributeError, match=rf"{name}\(\) of NuSAM .*ascent= are given once, when NuSAM is built"):
            setattr(opt, name, value)
    calls = []
    wrapped = getattr(opt, name)
    setattr(opt, name, lambda *args, **options: (calls.append(name), wrapped(*args, **options))[1])
    for _ in opt.passes():
        model(torch.randn(4, 6).double()).square().mean().backward()
    opt.step()
    assert calls in ([], [name])


@pytest.mark.parametrize("name", sorted(SETTABLE - {"rho"}))
def test_nothing_changes_inside_a_pass(name):
    model = network()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
    before = weights(model)
    values = {"delay": 3, "rho_schedule": None, "ascent_share": 0.5, "model": nn.Sequential(model)}
    with pytest.raises(RuntimeError, match=f"setting {name} was called inside the ascent pass"):
        for _ in opt.passes():
            setattr(opt, name, values[name])
    assert_unperturbed(model, before)
