"""A radius of 0 is meant so; a delay that outlasts the run, or a loop without passes, may not be."""

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


def test_a_loop_that_runs_no_passes_is_told_at_once_and_once():
    model, opt = made({"rho": 0.1})

    def train():
        for _ in range(4):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()

    with pytest.warns(UserWarning, match=r"step\(\) has been called twice without passes before it") as told:
        train()
    assert len(told) == 1
    with pytest.warns(UserWarning, match="has not been active in any of 4 steps"):
        opt.state_dict()


@pytest.mark.parametrize("meant", ["delayed", "a first plain step", "rho is 0", "no gradient"])
def test_steps_without_passes_may_be_meant(meant):
    options = {"delayed": {"delay": 9}, "rho is 0": {"rho": 0.0}}.get(meant, {"rho": 0.1})
    model, opt = made(options)
    for step in range(3):
        opt.zero_grad()
        if meant != "no gradient":
            loss_of(model).backward()
        opt.step()
        if meant == "a first plain step" and step == 0:
            run(opt, model, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del opt


@pytest.mark.parametrize("every", [2, 3])
def test_micro_batches_without_accumulate_are_told_once(every):
    model, opt = made({"rho": 0.1})

    def train():
        for step in range(12):
            for _ in opt.passes():
                loss_of(model).backward()
            if step % every == every - 1:
                opt.step()

    with pytest.warns(UserWarning, match=r"passes\(\) has cleared the gradients of passes that no step") as told:
        train()
    assert len(told) == 1


@pytest.mark.parametrize(
    "meant", ["accumulated", "cleared", "thrown away once", "skipped by a scaler", "never stepped"]
)
def test_passes_without_a_step_may_be_meant(meant):
    model, opt = made({"rho": 0.1})
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(4):
        for _ in opt.passes(accumulate=meant == "accumulated"):
            loss = scaler.scale(loss_of(model))
            (loss * torch.inf if meant == "skipped by a scaler" else loss).backward()
        if meant == "cleared":
            opt.zero_grad()
        elif meant == "skipped by a scaler":
            scaler.step(opt)
            scaler.update()
        elif meant == "thrown away once" and step > 0:
            opt.step()
