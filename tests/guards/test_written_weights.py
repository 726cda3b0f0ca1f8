"""Weights that the forward itself writes: after a step they are those of one forward at the unperturbed weights."""

import copy
import warnings
from itertools import product

import pytest
import torch
from torch import nn

import nusam
from tests.guards.writers import CASES, NAMES, Parent, Writing, by_replacement, clamped_through_data, model_with

RHO = 0.5
F32 = torch.float32
METHODS = {
    "SAM": (nusam.SAM, {}),
    "SAM-ON": (nusam.SAMON, {}),
    "νSAM": (nusam.NuSAM, {}),
    "νSAM by gradients": (nusam.NuSAM, {"ascent": "gradient"}),
    "νSAM without the model": (nusam.NuSAM, {"model": None}),
    "νSAM-Norm": (nusam.NuSAMNorm, {}),
}


def loss_of(model, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64).to(dtype)
    return (model(x) - 0.3).square().mean()


def build(method, model, lr, **more):
    kind, options = METHODS[method]
    return kind(torch.optim.SGD(model.parameters(), lr=lr), rho=RHO, **{"model": model, **options, **more})


def run(opt, model, step, dtype=torch.float64):
    for _ in opt.passes():
        loss_of(model, step, dtype).backward()
    opt.step()


def with_norm(model):
    """SAM-ON needs a layer to perturb."""
    return nn.Sequential(*model, nn.LayerNorm(4, dtype=model[2].weight.dtype))


@pytest.mark.parametrize(("method", "dtype"), [*product(METHODS, [torch.float64]), ("SAM", F32), ("νSAM", F32)])
@pytest.mark.parametrize(("place", "write"), CASES, ids=NAMES)
def test_a_step_without_a_step_size_leaves_what_one_forward_leaves(place, write, method, dtype):
    model = with_norm(model_with(place, write, dtype))
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    opt = build(method, model, lr=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The model writes")  # what only the descent writes is seen too late
        for step in range(5):
            once = copy.deepcopy(model)
            loss_of(once, step, dtype)
            run(opt, model, step, dtype)
            if step == 0:
                continue
            for (name, parameter), expected in zip(model.named_parameters(), once.parameters(), strict=True):
                exact = name.startswith("0") and "weight" in name
                ulp = 0 if exact else torch.finfo(dtype).eps * (expected.abs() + RHO)
                assert ((parameter - expected).abs() <= ulp).all(), (step, name)
    if write is not by_replacement and "twice" not in write.__name__:
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


@pytest.mark.parametrize("method", ["SAM", "νSAM by gradients"])
@pytest.mark.parametrize(("place", "write"), CASES, ids=NAMES)
def test_training_is_that_of_a_loop_with_copies(place, write, method):
    """ε is added to what the ascent's forward left, and taken back to just that."""
    model = model_with(place, write)
    kind, _ = METHODS[method]
    opt = build(method, model, lr=0.1, **({} if kind is nusam.SAM else {"power_iterations": 200}))
    by_hand = copy.deepcopy(model)
    base = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    exact = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            base.zero_grad()
            loss_of(by_hand, step).backward()
            left = [p.detach().clone() for p in by_hand.parameters()]
            gradients = [p.grad.clone() for p in by_hand.parameters()]
            total = torch.sqrt(sum(g.square().sum() for g in gradients))
            with torch.no_grad():
                for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                    if kind is nusam.SAM:
                        parameter += RHO * gradient / total
                    elif gradient.ndim == 2:
                        U, _, Vh = torch.linalg.svd(gradient)
                        parameter += RHO * torch.outer(U[:, 0], Vh[0])
            base.zero_grad()
            loss_of(by_hand, step).backward()
            with torch.no_grad():
                for parameter, before in zip(by_hand.parameters(), left, strict=True):
                    parameter.copy_(before)
            base.step()
            run(opt, model, step)
            exact = exact and not any("The model writes" in str(w.message) for w in caught)
            for (name, parameter), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
                if exact:
                    torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9, msg=f"{step}: {name}")
    assert exact or (kind is nusam.NuSAM and write is clamped_through_data)  # which only the descent did at first


def test_what_only_the_descent_writes_is_told_once_and_copied_from_then_on():
    """With ε a weight leaves the bounds that it keeps without: nothing could tell before."""
    model = model_with(Parent, clamped_through_data)
    with torch.no_grad():
        model[0].child.weight.clamp_(-0.15, 0.15)
    before = model[0].child.weight.detach().clone()
    opt = build("νSAM by gradients", model, lr=0.0)
    with pytest.warns(UserWarning, match=r"The model writes 0\.child\.weight in its own forward") as caught:
        run(opt, model, 0)
    assert len(caught) == 1
    with torch.no_grad():
        model[0].child.weight.copy_(before)
    for step in range(1, 5):  # a warning would be an error here
        run(opt, model, step)
        assert torch.equal(model[0].child.weight, before)


def test_a_write_that_no_layer_is_known_for_is_exact_from_the_first_step_on():
    """A copy keeps what stands in a layer of one's own while it is not known what that does."""
    model = model_with(Writing, clamped_through_data)
    with torch.no_grad():
        model[0].weight.clamp_(-0.15, 0.15)
    before = model[0].weight.detach().clone()
    opt = build("νSAM by gradients", model, lr=0.0)
    for step in range(5):
        run(opt, model, step)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("moment", ["before the forward", "after the forward"])
@pytest.mark.parametrize("method", ["SAM", "νSAM"])
@pytest.mark.parametrize(("place", "write"), CASES, ids=NAMES)
def test_an_exception_in_the_descent_leaves_what_the_ascent_left(place, write, method, moment):
    model = with_norm(model_with(place, write))
    opt = build(method, model, lr=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The model writes")
        run(opt, model, 0)
    once = copy.deepcopy(model)
    loss_of(once, 1)
    with pytest.raises(KeyboardInterrupt):
        for name in opt.passes():
            if name == "descent" and moment == "before the forward":
                raise KeyboardInterrupt
            loss_of(model, 1).backward()
            if name == "descent":
                raise KeyboardInterrupt
    for (name, parameter), expected in zip(model.named_parameters(), once.parameters(), strict=True):
        exact = name.startswith("0") and "weight" in name
        ulp = 0 if exact else torch.finfo(torch.float64).eps * (expected.abs() + RHO)
        assert ((parameter - expected).abs() <= ulp).all(), name


@pytest.mark.parametrize(("place", "write"), CASES, ids=NAMES)
def test_a_step_without_a_perturbation_keeps_what_its_forward_wrote(place, write):
    model = model_with(place, write)
    opt = build("νSAM by gradients", model, lr=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The model writes")
        run(opt, model, 0)
    opt.param_groups[0]["rho"] = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    once = copy.deepcopy(model)
    loss_of(once, 1)
    run(opt, model, 1)
    for parameter, expected in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_ordinary_layers_are_never_copied():
    """Not in the steps that check either: ε of νSAM costs vectors."""
    width = 200
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 4))
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model, ascent="gradient")
    sizes = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "clone" in str(func) and isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    for step in range(3):
        for name in opt.passes():
            loss_of(model, step, torch.float32).backward()
            if name == "ascent":
                watching = Watching()
                watching.__enter__()
        watching.__exit__(None, None, None)
        opt.step()
    assert max(sizes, default=0) < width


def test_a_copy_of_the_optimizer_knows_what_is_written():
    model = model_with(Parent, by_replacement)
    opt = build("νSAM by gradients", model, lr=0.0)
    run(opt, model, 0)
    other = copy.deepcopy(opt)
    once = copy.deepcopy(other.model)
    loss_of(once, 1)
    run(other, other.model, 1)
    assert torch.equal(other.model[0].child.weight, once[0].child.weight)
