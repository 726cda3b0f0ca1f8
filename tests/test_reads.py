"""Weights that are read beside their layers while ε lives in the forward."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nusam
from nusam.layers.reads import Watched
from nusam.layers.uses import find_uses


def small():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def optimizer(model, **options):
    base = options.pop("base", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return nusam.NuSAM(base, rho=0.3, model=model, placement="forward", **options)


def seen_in_descent(look, dtype=torch.float64, after=False):
    """What ``look`` finds of a weight in a descent, the weight, and the ascent's gradient."""
    torch.manual_seed(0)
    model = small().to(dtype)
    opt = optimizer(model)
    x = torch.randn(4, 6).to(dtype)
    W = model[0].weight.detach().clone()
    for name in opt.passes():
        loss = model(x).square().sum()
        found = None if after else look(model[0].weight)
        loss.backward()
        found = look(model[0].weight) if after else found
        if name == "ascent":
            G = model[0].weight.grad.double().clone()
    assert type(model[0].weight) is nn.Parameter
    return found, W, G


LOOKS = {
    "detach": lambda W: W.detach().clone(),
    "data": lambda W: W.data.clone(),
    "transposed": lambda W: W.detach().T.clone().T,
    "rows": lambda W: torch.stack([W[i].detach() for i in range(5)]),
    "sum": lambda W: (W + 0).detach(),
    "list": lambda W: torch.cat([W, W]).detach()[:5],
    "out": lambda W: torch.add(W.detach(), 0, out=torch.empty_like(W)),
    "as another": lambda W: W.reshape_as(torch.empty(30).to(W)).detach().view(5, 6),
    "moved by": lambda W: torch.zeros_like(W).lerp_(W, 1.0).detach(),
    "at once": lambda W: torch._foreach_mul([W.detach()], 1.0)[0],
    "numpy": lambda W: torch.from_numpy(W.detach().numpy().copy()),
    "subclass": lambda W: (W.detach() + torch.zeros(5, 6).to(W).as_subclass(Other)).as_subclass(torch.Tensor),
}


class Other(torch.Tensor):
    """A subclass that knows of no other."""


@pytest.mark.parametrize("look", LOOKS)
def test_a_reader_finds_epsilon_in_the_descent(look):
    found, W, G = seen_in_descent(lambda W: LOOKS[look](W).detach())
    E = found.double() - W
    assert float(torch.linalg.matrix_norm(E)) == pytest.approx(0.3, rel=1e-6)
    assert torch.linalg.matrix_rank(E, rtol=1e-6) == 1
    assert float((E * G).sum()) > 0.9 * 0.3 * float(torch.linalg.matrix_norm(G, 2))


@pytest.mark.parametrize("look", ["detach", "data", "sum"])
def test_after_the_last_backward_a_reader_finds_the_unperturbed_weight(look):
    found, W, _ = seen_in_descent(LOOKS[look], after=True)
    assert torch.equal(found, W)


def test_a_reader_of_bfloat16_weights_finds_epsilon_in_their_precision():
    found, W, _ = seen_in_descent(LOOKS["detach"], torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - W.double()).norm()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    "ask",
    [
        lambda W: (W.shape, W.size(0), W.dtype, W.device, W.ndim, W.numel(), len(W), W.stride(), W.is_contiguous()),
        lambda W: (hash(W), W.data_ptr(), W.requires_grad, W.is_leaf, W.grad is None, repr(type(W.untyped_storage()))),
        lambda W: ({W: 1}[W], W is next(iter({W})), isinstance(W, nn.Parameter)),
    ],
)
def test_what_is_asked_of_a_weight_is_answered_by_the_weight_itself(ask):
    model = small()
    opt, expected, found = optimizer(model), ask(model[0].weight), []
    for _ in opt.passes():
        found.append(ask(model[0].weight))
        model(torch.ones(2, 6)).sum().backward()
    assert found == [expected, expected]


MADE = {
    "parameter": lambda W: nn.Parameter(W),
    "parameter, frozen": lambda W: nn.Parameter(W, requires_grad=False),
    "parameter of a copy": lambda W: nn.Parameter(W.clone().detach()),
    "parameter of .data": lambda W: nn.Parameter(W.data),
    "buffer": lambda W: nn.Buffer(W),
    "subclass": lambda W: Given(W),
    "deepcopy": copy.deepcopy,
    "deepcopies": lambda W: copy.deepcopy({"a": [W]})["a"][0],
}


class Given(nn.Parameter):
    """A library's own kind of parameter."""

    def __new__(cls, data, requires_grad=True):
        return super().__new__(cls, data, requires_grad)


@pytest.mark.parametrize("make", MADE)
def test_a_parameter_made_of_a_weight_has_what_the_pass_computes_with(make):
    new = vars(nn.Parameter)["__new__"]
    found, W, G = seen_in_descent(lambda W: MADE[make](W))
    assert type(found) is (Given if make == "subclass" else torch.Tensor if make == "buffer" else nn.Parameter)
    assert found.requires_grad == ("frozen" not in make)
    assert found.is_leaf or make == "buffer"
    E = found.detach() - W
    assert float(torch.linalg.matrix_norm(E)) == pytest.approx(0.3, rel=1e-6)
    assert float((E * G).sum()) > 0.9 * 0.3 * float(torch.linalg.matrix_norm(G, 2))
    assert vars(nn.Parameter)["__new__"] is new


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("options", [{}, {"ascent": "matrix-free"}, {"ascent": "gradient"}, {"placement": "forward"}])
def test_a_loop_may_make_parameters_of_weights_in_both_passes(make, options):
    """After a backward too, when gradients are watched; a loop without the library finds the same."""
    torch.manual_seed(0)
    model, x, found = small().double(), torch.randn(4, 6, dtype=torch.float64), []
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, model=model, power_iterations=99, **options)
    for _ in range(3):
        for _ in opt.passes():
            loss = model(x).square().sum()
            made = MADE[make](model[0].weight).detach().clone()
            loss.backward()
            found.append((made, MADE[make](model[0].weight).detach().clone()))
    before = model[0].weight.detach()
    for (ascent, after_ascent), (descent, _) in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(ascent, before, rtol=0, atol=1e-12)
        torch.testing.assert_close(after_ascent, before, rtol=0, atol=1e-12)
        assert float((descent - before).norm()) == pytest.approx(0.3, rel=1e-6)


def test_copies_and_pickles_made_in_a_pass_are_plain_parameters():
    model = small()
    opt = optimizer(model)
    before = model[0].weight.detach().clone()
    for name in opt.passes():
        made = [copy.deepcopy(model[0].weight)]
        if name == "descent":
            file = io.BytesIO()
            torch.save(model[0].weight, file)
            file.seek(0)
            made.append(torch.load(file, weights_only=True))
        for parameter in made:
            assert type(parameter) is nn.Parameter
            assert parameter.requires_grad
            assert torch.equal(parameter, before) or (name == "descent" and parameter is made[0])  # which has its ε
            assert not [name for name in vars(parameter) if name.startswith("_nusam")]
        model(torch.ones(2, 6)).sum().backward()
    opt.step()


def test_a_hook_and_a_gradient_asked_for_are_the_weights_own():
    model = small()
    opt, x, heard = optimizer(model), torch.ones(2, 6), []
    for name in opt.passes():
        loss = model(x).square().sum()
        if name == "descent":
            handle = model[0].weight.register_hook(heard.append)
            (asked,) = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
            handle.remove()
        loss.backward()
    assert torch.equal(asked, model[0].weight.grad)
    assert torch.equal(heard[0], asked)


@pytest.mark.parametrize("write", [lambda W: W.data.mul_(0.5), lambda W: W.detach().clamp_(-0.1, 0.1)])
def test_a_write_that_begins_midway_is_refused(write):
    model = small()
    opt, x = optimizer(model), torch.randn(4, 6)

    def step(writes):
        for _ in opt.passes():
            if writes:
                write(model[0].weight)
            model(x).square().sum().backward()
        opt.step()

    for _ in range(3):
        step(writes=False)
    written = model[0].weight.detach().clone()
    write(written)
    with pytest.raises(RuntimeError, match=r"^0.weight is written in the passes themselves, "):
        step(writes=True)
    assert torch.equal(model[0].weight, written)  # as the ascent left it


def test_a_step_in_the_backward_decays_the_weight_and_not_the_perturbed_one():
    torch.manual_seed(0)
    model = small().double()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    for at_once, net in ((True, model), (False, twin)):
        opt = optimizer(net, base=torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5))
        if at_once:
            nusam.step_in_backward(opt)
        for _ in range(3):
            for _ in opt.passes():
                net(x).square().sum().backward()
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_an_exception_leaves_plain_parameters():
    model = small()
    opt = optimizer(model)
    seen = []
    with pytest.raises(KeyError):
        for name in opt.passes():
            model(torch.ones(2, 6)).sum().backward()
            seen += [type(p) for p in model.parameters()]
            if name == "descent":
                raise KeyError
    assert Watched in seen
    assert all(type(p) is nn.Parameter and not vars(p) for p in model.parameters())


def test_frozen_weights_are_frozen_and_without_a_gradient_after_any_pass():
    model = small()
    model[0].requires_grad_(False)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    opt = nusam.NuSAM(base, rho=0.3, model=model, targets="frozen")
    for step in range(6):
        try:
            for _ in opt.passes():
                loss = model(torch.ones(2, 6)).square().sum()
                if step == 3:
                    raise KeyError
                loss.backward()
                if step == 4:
                    raise KeyError
            opt.step()
        except KeyError:
            pass
        assert model[0].weight.grad is None
        assert not model[0].weight.requires_grad


def test_layers_patched_before_the_import_are_no_layers_of_torch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda layer, x: 2 * F.linear(x, layer.weight, layer.bias))
        assert not list(find_uses(small()))
    assert len(list(find_uses(small()))) == 2


def linearized(model, x):
    y, along = torch.func.linearize(model, x)
    return (y - 1.5).square().mean() + along(x).square().mean()


def recorded(model, x):
    return (torch.jit.trace(model, x, check_trace=False)(x) - 1.5).square().mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [linearized, recorded])
@pytest.mark.parametrize("options", [{}, {"ascent": "matrix-free"}, {"placement": "forward"}, {"ascent": "gradient"}])
def test_a_model_may_be_recorded_in_its_passes_or_that_is_refused(loss, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 8)).double()
    plain = copy.deepcopy(model)
    x = torch.randn(8, 6, dtype=torch.float64)
    base = torch.optim.SGD(plain.parameters(), lr=0.05)
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.05), rho=0.3, model=model, power_iterations=150, **options
    )
    for _ in range(4):
        if "placement" in options:
            before = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(RuntimeError, match=r"use placement='weights'"):
                for _ in opt.passes():
                    loss(model, x).backward()
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
            continue
        for _ in opt.passes():
            loss(model, x).backward()
        opt.step()
        base.zero_grad()
        loss(plain, x).backward()
        before = [p.detach().clone() for p in plain.parameters()]
        for p in plain.parameters():
            if p.ndim == 2:
                U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
                p.data += 0.3 * torch.outer(U[:, 0], Vh[0])
        base.zero_grad()
        loss(plain, x).backward()
        for p, old in zip(plain.parameters(), before, strict=True):
            p.data = old
        base.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
