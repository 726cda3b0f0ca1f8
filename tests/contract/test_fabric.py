"""Fabric's wrapper around an optimizer, which imitates its class: our methods run on the wrapper."""

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn.functional import cross_entropy

import nusam
from tests.contract.problem import Run, Trained, loader


@pytest.fixture
def prepared():
    trained = Trained.start(Run())
    fabric = Fabric(accelerator="cpu", devices=1)
    model, opt = fabric.setup(trained.model, trained.wrap(trained.base(), trained.model))
    return trained, fabric, model, opt


def test_the_wrapper_imitates_the_class(prepared):
    """What the others here are about; should Fabric stop it, they can go."""
    trained, _, _, opt = prepared
    assert isinstance(opt, nusam.NuSAM)
    assert opt is not trained.opt


@pytest.mark.parametrize("through", ["wrapper", "optimizer"])
def test_passes_through_the_wrapper_are_those_of_the_optimizer(prepared, through):
    trained, fabric, model, opt = prepared
    plain = Trained.start(Run())
    expected = plain.wrap(plain.base(), plain.model)
    for group in (*opt.param_groups, *expected.param_groups):
        group["lr"] = 0.0  # as in the first step of a warm-up: only a pass tells that it was a step
    for index, (x, y) in enumerate(loader(Run())):
        for _ in (opt if through == "wrapper" else trained.opt).passes():
            fabric.backward(cross_entropy(model(x), y))
        for _ in expected.passes():
            plain.model.loss(x, y).backward()
        for optimizer in (opt, expected):
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 0.1
        assert trained.opt.state_dict()["param_groups"][0]["nusam_steps"] == index + 1
    for a, b in zip(trained.weights, plain.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["step", "state_dict"])
def test_what_is_refused_inside_a_pass_is_refused_through_the_wrapper(prepared, what):
    trained, fabric, model, opt = prepared
    x, y = next(iter(loader(Run())))
    with pytest.raises(RuntimeError, match="inside the descent pass"):
        for name in opt.passes():
            fabric.backward(cross_entropy(model(x), y))
            if name == "descent":
                getattr(opt, what)()
    assert trained.rates == []


def test_step_in_backward_reaches_the_optimizer_behind_the_wrapper(prepared):
    trained, fabric, model, opt = prepared
    nusam.step_in_backward(opt)
    before = trained.weights
    x, y = next(iter(loader(Run())))
    for _ in opt.passes():
        fabric.backward(cross_entropy(model(x), y))
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(trained.weights, before, strict=True))
