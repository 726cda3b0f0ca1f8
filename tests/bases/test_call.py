"""The calls of other libraries, above all davda54/sam's, reach a sentence that shows the right one."""

import copy
import inspect
import pickle

import pytest
import schedulefree
import torch
from torch import nn

import nusam

KINDS = {"NuSAM": {}, "NuSAMNorm": {}, "SAM": {}, "GaussSAM": {}, "SAMON": {"model": "model"}}
SGD = torch.optim.SGD


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def shown(kind, base, *options):
    needs_model = [] if kind != "SAMON" else ["model=model"]
    return f"nusam.{kind}({', '.join([base, *options, *needs_model])})."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["positional", "by name", "all by name", "a list", "groups"])
def test_the_call_of_davda54(kind, order):
    make = getattr(nusam, kind)
    parameters = model().parameters()
    calls = {
        "positional": lambda: make(parameters, SGD, rho=0.1, lr=0.2, momentum=0.9),
        "by name": lambda: make(parameters, base_optimizer=SGD, rho=0.1, lr=0.2, momentum=0.9),
        "all by name": lambda: make(params=parameters, base_optimizer=SGD, rho=0.1, lr=0.2, momentum=0.9),
        "a list": lambda: make(list(parameters), SGD, rho=0.1, lr=0.2, momentum=0.9),
        "groups": lambda: make([{"params": list(parameters)}], SGD, rho=0.1, adaptive=False, lr=0.2, momentum=0.9),
    }
    base = "SGD(model.parameters(), lr=0.2, momentum=0.9)"
    if order == "all by name":
        base = base.replace("lr", "params=..., lr")
    with pytest.raises(TypeError) as error:
        calls[order]()
    sentence = f"base_optimizer must be an optimizer, got the class SGD; construct it first, {base}, as in "
    assert str(error.value) == sentence + shown(kind, base, "rho=0.1")


def test_a_radius_of_another_name_and_scaling_that_is_a_method_of_its_own():
    with pytest.raises(TypeError) as error:
        nusam.RWP(SGD(model().parameters(), lr=0.1), rho=0.1, mixture=0.5)
    sentence = "RWP takes its radius as sigma, got rho; write nusam.RWP(<the optimizer>, sigma=0.1, mixture=0.5)."
    assert str(error.value) == sentence
    with pytest.raises(TypeError, match=r"as in nusam.RWP\(SGD\(model.parameters\(\), lr=0.2\), sigma=0.1\)"):
        nusam.RWP(model().parameters(), SGD, rho=0.1, lr=0.2)
    for kind in (nusam.SAM, nusam.ASAM, nusam.NuSAM):
        with pytest.raises(TypeError, match=r"takes no adaptive=; nusam\.ASAM is what adaptive=True means elsewhere"):
            kind(SGD(model().parameters(), lr=0.1), adaptive=True)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_no_optimizer_at_all(kind):
    with pytest.raises(TypeError) as error:
        getattr(nusam, kind)(model().parameters(), lr=0.2, betas=(0.9, 0.99), delay=3)
    base = "torch.optim.AdamW(model.parameters(), lr=0.2, betas=...)"
    assert str(error.value).endswith(f"got generator; construct it first, {base}, as in {shown(kind, base, 'delay=3')}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [SGD, model, lambda: model, "sgd", None, 3])
def test_anything_else_in_its_place(kind, given):
    with pytest.raises(TypeError, match=r"base_optimizer must be .* construct it first, .*\.parameters\(\), \.\.\.\)"):
        getattr(nusam, kind)(given)


class Scales:
    """Around an optimizer without being one, as apex's LARC; here it halves the gradients."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad.mul_(0.5)
        self.optimizer.step()


def schedule_free(optimizer):
    wrapper = schedulefree.ScheduleFreeWrapper(optimizer, momentum=0.9)
    wrapper.train()
    return wrapper


@pytest.mark.parametrize("wrap", [Scales, schedule_free])
def test_what_steps_and_is_no_optimizer_is_told_so_and_goes_around_ours(wrap):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    batches = torch.randn(6, 5, 3, dtype=torch.float64)
    by_hand, trained = net(), net()
    alone = wrap(SGD(by_hand.parameters(), lr=0.1))
    for kind in KINDS:
        with pytest.raises(TypeError) as error:
            getattr(nusam, kind)(alone, rho=0.1)
        name = type(alone).__name__
        assert str(error.value) == (
            f"base_optimizer must be a torch.optim.Optimizer, got a {name}, which has a step() and is none; take one "
            f"that is, or put the {name} around nusam's optimizer instead, and loop over the passes of that one."
        )
    opt = nusam.NuSAM(SGD(trained.parameters(), lr=0.1), rho=0.1, power_iterations=500)
    around = wrap(opt)
    for x in batches:
        for _ in opt.passes():
            trained(x).square().mean().backward()
        around.step()
        parameters = list(by_hand.parameters())
        before = [p.detach().clone() for p in parameters]
        gradients = torch.autograd.grad(by_hand(x).square().mean(), parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                if p.ndim == 2:
                    U, _, Vh = torch.linalg.svd(gradient)
                    p.add_(0.1 * torch.outer(U[:, 0], Vh[0]))
        gradients = torch.autograd.grad(by_hand(x).square().mean(), parameters)
        with torch.no_grad():
            for p, old, gradient in zip(parameters, before, gradients, strict=True):
                p.copy_(old)
                p.grad = gradient
        alone.step()
    for p, q in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_behind_parameters(kind):
    parameters = list(model().parameters())
    for call in (
        lambda: getattr(nusam, kind)(parameters, SGD(parameters, lr=0.1), rho=0.3),
        lambda: getattr(nusam, kind)(parameters, base_optimizer=SGD(parameters, lr=0.1), rho=0.3),
    ):
        with pytest.raises(TypeError, match=r"takes the base optimizer alone, got list before it; write nusam\.") as e:
            call()
        assert "rho=0.3" in str(e.value)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_base_beside_a_base_that_is_there(kind):
    net = model()
    with pytest.raises(TypeError) as error:
        getattr(nusam, kind)(SGD(net.parameters(), lr=0.1), model=net, lr=0.2)
    assert str(error.value).startswith(f"{kind} got 'lr', and takes rho, ")
    assert str(error.value).endswith("what is the base optimizer's own goes to it, SGD(model.parameters(), lr=0.2).")


def test_a_class_of_ones_own_keeps_its_signature():
    class FromParameters(nusam.SharpnessAware):
        def __init__(self, params, lr, **options):
            super().__init__(SGD(params, lr=lr), nusam.lmo.L2(), **options)

    class Marked(nusam.SAM):
        def __init__(self, base_optimizer, *, mark, **options):
            super().__init__(base_optimizer, options.pop("radius"), **options)
            self.mark = mark

    class AnyOf(nusam.SAM):
        def __init__(self, *args, **options):
            super().__init__(SGD(*args), **options)

    assert FromParameters(model().parameters(), lr=0.1, rho=0.2).defaults == pytest.approx(
        {**SGD(model().parameters(), lr=0.1).defaults, "rho": 0.2}
    )
    opt = Marked(SGD(model().parameters(), lr=0.1), mark=3, radius=0.2)
    assert (opt.mark, opt.defaults["rho"]) == (3, 0.2)
    assert AnyOf(model().parameters(), 0.3, rho=0.1).defaults["lr"] == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_and_copies_are_as_ever(kind):
    net = model()
    make = getattr(nusam, kind)
    assert next(iter(inspect.signature(make).parameters)) == "base_optimizer"
    assert list(inspect.signature(nusam.SharpnessAware).parameters)[:3] == ["base_optimizer", "lmo", "rho"]
    opt = make(base_optimizer=SGD(net.parameters(), lr=0.1), model=net)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert type(other) is make
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'base_optimizer'"):
        make(rho=0.1)
