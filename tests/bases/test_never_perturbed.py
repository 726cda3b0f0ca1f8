"""A radius of 0 is meant so; a delay that outlasts the run, or a schedule that is always 0, may not be."""

import copy
import warnings

import pytest
import torch

import nusam
from tests.bases.problem import loss_of, net

pytestmark = pytest.mark.usefixtures("never_perturbed_warning")
QUIET = {
    "rho": {"rho": 0.0},
    "rho and delay": {"rho": 0.0, "delay": 5},
    "rho and a schedule": {"rho": 0.0, "rho_schedule": lambda step: 1.0},
    "perturbed": {"rho": 0.1},
    "perturbed at the end": {"rho": 0.1, "delay": 2},
}
SAYS_SO = {
    "delay": {"rho": 0.1, "delay": 5},
    "schedule": {"rho": 0.1, "rho_schedule": lambda step: 0.0},
    "schedule that starts late": {"rho": 0.1, "rho_schedule": lambda step: float(step >= 5)},
}


def run(opt, model, steps=3):
    for _ in range(steps):
        for _ in opt.passes():
            loss_of(model).backward()
        opt.step()


def made(options):
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    return model, nusam.NuSAM(torch.optim.SGD(groups, lr=0.1), **options)


@pytest.mark.parametrize("options", QUIET)
@pytest.mark.parametrize("end", ["saved", "collected", "copied and collected", "resumed"])
def test_on_purpose_nothing_is_said(options, end):
    model, opt = made(QUIET[options])
    run(opt, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if end == "saved":
            opt.state_dict()
        elif end == "copied and collected":
            other = copy.deepcopy(opt)
            del other
        elif end == "resumed":
            _, other = made(QUIET[options])
            other.load_state_dict(opt.state_dict())
            other.state_dict()
        del opt


def test_groups_whose_radius_is_0_are_meant_so_too():
    model, opt = made({"rho": 0.1})
    for group in opt.param_groups:
        group["rho"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(opt, model)
        opt.state_dict()
        del opt


@pytest.mark.parametrize("options", SAYS_SO)
def test_otherwise_it_says_so_once(options):
    model, opt = made(SAYS_SO[options])
    run(opt, model)
    with pytest.warns(UserWarning, match="has not been active in any of 3 steps"):
        opt.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.state_dict()
        del opt
    model, opt = made(SAYS_SO[options])
    run(opt, model)
    with pytest.warns(UserWarning, match="has not been active in any of 3 steps"):
        del opt


def test_a_radius_raised_in_a_run_that_ends_before_the_delay_says_so():
    model, opt = made({"rho": 0.0, "delay": 9})
    run(opt, model)
    opt.state_dict()
    opt.param_groups[0]["rho"] = 0.1
    run(opt, model)
    with pytest.warns(UserWarning, match="has not been active in any of 6 steps"):
        opt.state_dict()
