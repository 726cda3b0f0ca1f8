"""Parameters that are cast, grown, frozen or replaced during training: what is remembered and chosen follows them."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import nusam
from tests.conftest import assert_unperturbed, loss_of, mlp, train_step, weights

METHODS = {
    "NuSAM": nusam.NuSAM,
    "NuSAMNorm": nusam.NuSAMNorm,
    "SAM": nusam.SAM,
    "SAMON": nusam.SAMON,
    "GaussSAM": nusam.GaussSAM,
    "ASAM": nusam.ASAM,
    "VaSSO": nusam.VaSSO,
    "FriendlySAM": nusam.FriendlySAM,
    "USAM": nusam.USAM,
    "SSAM": functools.partial(nusam.SSAM, refresh=3),
    "RWP": nusam.RWP,
    "m-RWP": functools.partial(nusam.RWP, mixture=0.3),
    "GSAM": nusam.GSAM,
    "WSAM": nusam.WSAM,
    "LookSAM": functools.partial(nusam.LookSAM, every=3),
}
each_method = pytest.mark.parametrize("method", METHODS)


def made(method, model, **options):
    return METHODS[method](torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)


@each_method
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("saved", [False, True])
def test_a_model_that_is_cast_goes_on_as_from_its_state(method, steps, saved):
    model = mlp()
    opt = made(method, model)
    for step in range(steps):
        train_step(model, opt, step)
    if saved:
        opt.state_dict()
    other = copy.deepcopy(model).double()
    resumed = made(method, other)
    if steps or saved:  # else the warm starts are drawn later
        resumed.load_state_dict(copy.deepcopy(opt).state_dict())
    model.double()
    for step in range(steps, steps + 4):
        train_step(model, opt, step)
        train_step(other, resumed, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@each_method
@pytest.mark.parametrize("steps", [1, 3])
def test_a_layer_that_is_grown_begins_anew(method, steps):
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4)).double()
    opt = made(method, model)
    for step in range(steps):
        train_step(model, opt, step)
    model[0].weight.data = torch.randn(12, 6, dtype=torch.float64)
    model[0].bias.data = torch.randn(12, dtype=torch.float64)
    model[1].normalized_shape = (12,)
    model[1].weight.data, model[1].bias.data = torch.ones(2, 12, dtype=torch.float64).unbind()
    model[3].weight.data = torch.randn(4, 12, dtype=torch.float64)
    model.zero_grad()
    other = copy.deepcopy(model)
    fresh = made(method, other)
    fresh._progress.steps = steps
    fits = {model[3].bias, *([model[3].weight] if method.startswith("NuSAM") else [])}  # as many rows as before
    fresh._ascent.states = {
        q: {name: value.clone() for name, value in opt._states[p].items()}
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
        if p in opt._states and p in fits
    }
    for step in range(steps, steps + 4):
        train_step(model, opt, step)
        train_step(other, fresh, step)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_method
def test_once_all_targets_are_frozen_the_base_optimizer_trains_the_others_alone(method):
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).double()
    expected = copy.deepcopy(model)
    groups = [{"params": model[:2].parameters()}, {"params": model[3].parameters(), "rho": 0.0}]
    opt = METHODS[method](torch.optim.SGD(groups, lr=0.1, momentum=0.9), model=model)
    alone = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for m in (model, expected):
        m[:2].requires_grad_(False)
    for step in range(4):
        train_step(model, opt, step)
        alone.zero_grad()
        loss_of(expected, step).backward()
        alone.step()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    model.requires_grad_(True)
    for step in range(3):
        train_step(model, opt, step)
    assert any(value > 0 for name, value in opt.metrics().items() if name.startswith("epsilon/"))


@pytest.mark.parametrize("how", ["groups rewritten", "group added"])
def test_a_norm_that_replaces_another_is_perturbed(how):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    opt = nusam.SAMON(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    train_step(model, opt)
    model[1] = nn.GroupNorm(2, 8)
    if how == "groups rewritten":
        opt.param_groups[0]["params"] = list(model.parameters())
    else:
        opt.add_param_group({"params": model[1].parameters()})
    before = weights(model)
    for name in opt.passes():
        loss_of(model).backward()
        if name == "descent":
            moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, False, False]
    assert {name for name in opt.metrics() if name.startswith("epsilon/")} == {"epsilon/1.weight", "epsilon/1.bias"}


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("NuSAM")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dense_perturbation_of_weights_below_float32_is_told_of_once(method, dtype, when):
    model = mlp()
    if when == "before":
        model.to(dtype)
    opt = made(method, model)
    if when == "after":
        train_step(model, opt)
        model.to(dtype)
    told = []
    for step in range(4):  # LookSAM has an ε in every third
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, opt, step)
        told += [str(w.message) for w in caught]
    kind = type(opt).__name__
    assert len(told) == 1
    assert told[0].startswith(
        f"{kind} adds its ε to weights in {dtype}, which rounds much of it away; keep the weights"
    )
    accepting = made(method, model, placement="weights")
    train_step(model, accepting)  # without a warning, which would be an error here


@pytest.mark.parametrize("method", ["NuSAM", "NuSAMNorm"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_a_rank_one_perturbation_of_weights_that_were_cast_is_refused_without_a_model(method, convolutions):
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    opt = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.1), convolutions=convolutions)
    train_step(model, opt)
    model.bfloat16()
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is torch.bfloat16, and adding a rank-one ε .* pass model= so that"):
            train_step(model, opt)
        assert_unperturbed(model, before, rho=0)
    model.float()
    train_step(model, opt)


class Switched(nn.Module):
    """Frozen weights with two adapters, of which one runs at a time."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.adapters = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(2)])
        self.now = 0

    def forward(self, x):
        return torch.tanh(self.frozen(x) + self.adapters[self.now](x)).square().mean()


@pytest.mark.parametrize("targets", ["frozen", lambda name, p: name == "frozen.weight"])
@pytest.mark.parametrize("ascent", ["auto", "matrix-free"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_through_an_adapter_that_another_holds(targets, ascent, closure):
    model = Switched().double()
    expected = copy.deepcopy(model)
    x = torch.randn(8, 6, dtype=torch.float64)
    options = {"targets": targets, "ascent": ascent, "power_iterations": 500}
    bases = [torch.optim.SGD(m.adapters[0].parameters(), lr=0.1, momentum=0.9) for m in (model, expected)]
    opt = nusam.NuSAM(bases[0], 0.1, model=model, **options)

    def run():
        loss = model(x)
        loss.backward()
        return loss

    for now in (0, 0, 1, 0, 1, 1, 0):
        model.now = expected.now = now
        if closure:
            opt.step(run)
        else:
            for _ in opt.passes():
                run()
            opt.step()
        W = expected.frozen.weight.requires_grad_()
        (gradient,) = torch.autograd.grad(expected(x), W)
        U, _, Vh = torch.linalg.svd(gradient)
        expected.frozen.requires_grad_(False)
        before = W.detach().clone()
        W.data.add_(0.1 * torch.outer(U[:, 0], Vh[0]))
        expected.zero_grad()
        expected(x).backward()
        W.data.copy_(before)
        bases[1].step()
        torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-7, atol=1e-10)
    model.now = 0
    names = opt.passes()
    with pytest.raises(RuntimeError, match="descent pass ended without any gradient"):
        for name in names:
            if name == "ascent":
                run()


@pytest.mark.parametrize("options", [{"ascent": "matrix-free"}, {"placement": "forward"}, {"ascent": "gradient"}])
@pytest.mark.parametrize("how", ["load_state_dict", "to", "swap_tensors"])
@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_a_model_whose_tensors_are_swapped(how, at, options):
    model = mlp().double()
    expected = copy.deepcopy(model)
    pair = [model, expected]
    opts = [nusam.NuSAM(torch.optim.SGD(m.parameters(), lr=0.1), 0.05, model=m, **options) for m in pair]
    saved = copy.deepcopy(model.state_dict())
    for step in range(7):
        if step == at:
            opts[0].zero_grad()
            opts[1].zero_grad()
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                if how == "load_state_dict":
                    model.load_state_dict(saved)
                elif how == "to":
                    model.float().double()
                else:
                    for p in model.parameters():
                        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
            with torch.no_grad():
                for p, q in zip(model.parameters(), expected.parameters(), strict=True):
                    q.copy_(p)
        for opt, m in zip(opts, pair, strict=True):
            train_step(m, opt, step)
        torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-7, atol=1e-9)
    assert not [name for name in opts[0].metrics() if "fallback" in name]


IDS = torch.arange(24).view(6, 4) % 10
ROWS = torch.randn(5, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
SETTINGS = {  # of a layer, what it is when the optimizer is built, and what it is set to
    "max_norm": (lambda: nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 8)), IDS, None, 1.5),
    "scale_grad_by_freq": (lambda: nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 8)), IDS, False, True),
    "padding_idx": (lambda: nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 8)), IDS, None, -3),
    "stride": (lambda: nn.Sequential(nn.Conv1d(8, 64, 3), nn.Tanh(), nn.Conv1d(64, 8, 3)), ROWS, (1,), (2,)),
    "dilation": (lambda: nn.Sequential(nn.Conv1d(8, 64, 3), nn.Tanh(), nn.Conv1d(64, 8, 3)), ROWS, (1,), (2,)),
    "padding": (lambda: nn.Sequential(nn.Conv1d(8, 64, 3), nn.Tanh(), nn.Conv1d(64, 8, 3)), ROWS, (0,), (2,)),
}


def step_by_hand(model, base, loss, rho):
    """νSAM by an SVD of every matrix's gradient."""
    base.zero_grad()
    loss(model).backward()
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                U, _, Vh = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
                p += rho * torch.outer(U[:, 0], Vh[0]).view(p.shape)
    base.zero_grad()
    loss(model).backward()
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    base.step()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("begins", [0, 3])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("options", [{"ascent": "matrix-free"}, {"placement": "forward"}])
def test_what_a_layer_goes_by_may_be_set_at_any_time(name, begins, inside, options):
    """Between steps for good, or in a pass for one of two calls."""
    build, x, usual, value = SETTINGS[name]

    def loss(model, changes):
        total = 0.0
        if changes and inside:
            setattr(model[0], name, value)
            total = (model(x) - 0.5).square().mean()
            setattr(model[0], name, usual)
        return total + (model(x) - 1.5).square().mean()

    torch.manual_seed(0)
    model = build().double()
    plain = copy.deepcopy(model)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    options = {"rho": 0.3, "model": model, "convolutions": True, "power_iterations": 120, **options}
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    for step in range(begins + 3):
        if step == begins and not inside:
            setattr(model[0], name, value)
            setattr(plain[0], name, value)
        changes = step >= begins
        sentence = ""
        try:
            for _ in opt.passes():
                loss(model, changes).backward()
        except (ValueError, RuntimeError) as refusal:
            sentence = str(refusal)
        if sentence:
            assert options.get("placement") == "forward"
            assert step == begins
            assert "exclude it with targets= or use placement='weights'" in sentence
            return
        opt.step()
        step_by_hand(plain, base, functools.partial(loss, changes=changes), 0.3)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
