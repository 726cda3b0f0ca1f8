"""The base optimizer's update inside the descent's backward: the same steps, in the memory of one gradient."""

import copy
import gc

import pytest
import torch
from torch import nn

import nusam
from tests.conftest import loss_of, mlp, train_step
from tests.test_brute_force import BASES, problem
from tests.test_memory import MB, HundredMillion, allocated_by


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("delay", [0, 3])
def test_the_steps_are_those_of_the_plain_loop(base, delay):
    model = problem(base)
    plain = copy.deepcopy(model)
    opt, reference = (
        nusam.NuSAM(BASES[base](m.parameters()), model=m, placement="forward", delay=delay) for m in (model, plain)
    )
    nusam.step_in_backward(opt)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (opt, reference)]
    for step in range(6):
        train_step(model, opt, step)
        train_step(plain, reference, step)
        for schedule in schedules:
            schedule.step()
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 if base == "muon" else 1e-12)
    assert opt.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def test_tied_weights_are_stepped_once_with_the_whole_gradient():
    from tests.test_matrix_free import Tied, square_loss

    model = Tied().double()
    plain = copy.deepcopy(model)
    opt, reference = (
        nusam.NuSAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, placement="forward") for m in (model, plain)
    )
    nusam.step_in_backward(opt)
    for _ in range(3):
        for m, o in ((model, opt), (plain, reference)):
            for _ in o.passes():
                square_loss()(m).backward()
            o.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_live_bytes_are_weights_one_gradient_and_two_vectors_a_matrix():
    def prepare(model):
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        nusam.step_in_backward(opt)
        return opt

    model, _, peak = allocated_by(HundredMillion, prepare)
    weights = sum(4 * p.numel() for p in model.parameters())
    largest = 4 * 2000 * 2000
    assert peak <= weights + 2 * largest + 4 * 25 * 8000 + MB  # a gradient, and the temporary of its update
    assert peak <= 1.2 * weights


def test_what_cannot_be_served_is_refused():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    nusam.step_in_backward(opt)
    with pytest.raises(RuntimeError, match="accumulate=True needs gradients that step_in_backward"):
        for _ in opt.passes(accumulate=True):
            loss_of(model).backward()
    scaler = torch.amp.GradScaler("cpu")
    for _ in opt.passes():
        scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="GradScaler can't unscale gradients that step_in_backward"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match="The descent pass ended without any gradient"):
        for name in opt.passes():
            if name == "ascent":
                loss_of(model).backward()
    with pytest.raises(RuntimeError, match="can't be copied or pickled"):
        copy.deepcopy(opt)

    with pytest.raises(ValueError, match="needs the rank-one perturbation"):
        nusam.step_in_backward(nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model))
    with pytest.raises(ValueError, match=r"step_in_backward\(\) needs model="):
        nusam.step_in_backward(nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1)))

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6))

    raw = Raw()
    opt = nusam.NuSAM(torch.optim.SGD(raw.parameters(), lr=0.1), model=raw)
    with pytest.raises(ValueError, match="no known layer in whose forward"):
        nusam.step_in_backward(opt)
    assert opt.placement == "auto"


def test_a_base_optimizer_with_state_in_its_groups_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["k"] += 1
            return super().step(closure)

    model = mlp()
    base = Counting(model.parameters(), lr=0.1)
    base.param_groups[0]["k"] = 0
    opt = nusam.NuSAM(base, model=model)
    nusam.step_in_backward(opt)
    with pytest.raises(TypeError, match="Counting keeps state in its param groups"):
        train_step(model, opt)


def test_backwards_outside_the_descent_keep_their_gradients_and_the_hooks_go_with_the_optimizer():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    nusam.step_in_backward(opt)
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_parameter_that_came_later_is_not_forgotten():
    model, late = mlp(), torch.nn.Linear(4, 4)
    whole = torch.nn.Sequential(model, late)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=whole)
    nusam.step_in_backward(opt)
    opt.add_param_group({"params": list(late.parameters())})
    with pytest.raises(RuntimeError, match="after step_in_backward\\(\\), and would never be stepped"):
        for _ in opt.passes():
            loss_of(whole).backward()


def two_losses(model, x):
    loss_of(model).backward()
    model(x).sin().mean().backward()


def twice_through_one_graph(model, x):
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def chunks(model, x):
    for part in x.chunk(3):
        model(part).square().mean().backward()


@pytest.mark.parametrize("several", [two_losses, twice_through_one_graph, chunks])
@pytest.mark.parametrize("begins", [0, 3, 4])
@pytest.mark.parametrize("ascent", ["auto", "matrix-free", "gradient"])
def test_a_second_backward_in_a_pass_is_refused_before_any_step(several, begins, ascent):
    model = mlp()
    opt = nusam.NuSAM(torch.optim.Adam(model.parameters(), lr=0.1), model=model, ascent=ascent)
    nusam.step_in_backward(opt)
    for step in range(begins):
        train_step(model, opt, step)
    before = copy.deepcopy(model.state_dict())
    width = next(model.parameters()).shape[1]
    with pytest.raises(RuntimeError, match=r"in several backwards of a pass, .* call backward\(\) once a pass, or"):
        for _ in opt.passes():
            several(model, torch.ones(6, width))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_only_the_descent_shows_is_refused_before_its_second_step():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).double()
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    opt = nusam.NuSAM(base, model=model, delay=1)
    nusam.step_in_backward(opt)
    with pytest.raises(RuntimeError, match=r"A parameter of shape \(\d+.*\) gets its gradient in several backwards"):
        for _ in opt.passes():
            two_losses(model, torch.ones(4, 6, dtype=torch.float64))
    assert all(state["step"] == 1 for state in base.state.values())


def test_backwards_that_share_no_parameter_are_steps_of_their_own():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    plain = copy.deepcopy(model)
    opt, reference = (
        nusam.NuSAM(torch.optim.Adam(m.parameters(), lr=0.1), model=m, placement="forward") for m in (model, plain)
    )
    nusam.step_in_backward(opt)
    for step in range(5):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, opt), (plain, reference)):
            for _ in o.passes():
                hidden = m[0](x)
                hidden.square().mean().backward()
                (m[2](m[1](hidden.detach())) - 1).square().mean().backward()
            o.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
