"""A perturbation without an optimizer to wrap, held to νSAM, to a loop by hand, and to its word about gradients."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nusam
from nusam.reference import svd_top1
from tests.conftest import batch

STEPS, RHO = 20, 0.1


def net(dtype=torch.float64):
    """Matrices on both sides of a table's size, dropout, and buffers that move."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 300), nn.BatchNorm1d(300)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(300, 4)).to(dtype)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train(model, make, steps=range(STEPS), micro_batches=1, autocast=False, state=None, share=1.0):
    """A loop whose step is a plain optimizer's; what it ends with."""
    dtype = next(model.parameters()).dtype
    perturbation = make(model)
    base = sgd(model)
    if state:
        model.load_state_dict(state["model"])
        base.load_state_dict(state["base"])
        perturbation.load_state_dict(state["perturbation"])
    for step in steps:
        base.zero_grad()
        for i in range(micro_batches):
            torch.manual_seed(1000 * step + i)
            ends_step = i == micro_batches - 1
            for x, y in perturbation.passes(*batch(micro_batches * step + i, dtype), ends_step=ends_step):
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    loss = F.cross_entropy(model(x), y)
                (loss / micro_batches).backward()
        base.step()
    return {"model": model.state_dict(), "base": base.state_dict(), "perturbation": perturbation.state_dict()}


class Wrapped:
    """NuSAM, driven as a perturbation is."""

    def __init__(self, model, **options):
        self.opt = nusam.NuSAM(sgd(model), RHO, model=model, **options)

    def passes(self, *batch, ends_step=True):
        yield from self.opt.passes(*batch, accumulate=True)
        if ends_step:
            self.opt.base_optimizer.step = lambda: None  # the loop steps
            self.opt.step()

    def state_dict(self):
        return self.opt.state_dict()


def assert_equal(one, other, tolerance):
    for name, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][name], rtol=0, atol=tolerance)


WAYS = [{"ascent": "gradient"}, {"ascent": "matrix-free", "placement": "forward"}]
RUNS = {
    "plain": {},
    "a share": {"ascent_share": 0.3},
    "a delay and a schedule": {"delay": 3, "rho_schedule": lambda k: (k + 1) ** -0.5},
    "more iterations": {"power_iterations": 3},
    "biases excluded": {"targets": lambda name, parameter: name != "4.weight"},
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_twenty_steps_equal_nusams(options, micro_batches, way):
    one = train(net(), lambda m: nusam.Perturbation(m, RHO, **options), micro_batches=micro_batches)
    other = train(net(), lambda m: Wrapped(m, **options, **way), micro_batches=micro_batches)
    assert_equal(one, other, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_precisions_equal_nusams(dtype, autocast):
    if autocast and dtype == torch.bfloat16:
        pytest.skip("autocast is for float32 weights")
    one = train(net(dtype), lambda m: nusam.Perturbation(m, RHO), autocast=autocast)
    other = train(net(dtype), lambda m: Wrapped(m, **WAYS[1]), autocast=autocast)
    assert_equal(one, other, 1e-6 if dtype == torch.float32 and not autocast else 0.05)


def test_twenty_steps_equal_a_loop_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    by_hand = copy.deepcopy(model)
    perturbation, base = nusam.Perturbation(model, RHO), sgd(model)
    us = {name: state["u"].double() for name, state in perturbation.state_dict()["matrices"].items()}
    for step in range(STEPS):
        base.zero_grad()
        for x, y in perturbation.passes(*batch(step, torch.float64)):
            F.cross_entropy(model(x), y).backward()
        base.step()
    base = sgd(by_hand)
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        base.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        before = [p.detach().clone() for p in by_hand.parameters()]
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                if p.ndim == 2:
                    us[name], v = svd_top1(p.grad / p.grad.abs().max(), us[name], 1)
                    p.add_(RHO * torch.outer(us[name], v))
        base.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        with torch.no_grad():
            for p, w in zip(by_hand.parameters(), before, strict=True):
                p.copy_(w)
        base.step()
    for p, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-9)


class Adapted(nn.Module):
    """A layer with an adapter that can be switched off, as peft does it: with its flags."""

    def __init__(self, how):
        super().__init__()
        self.base, self.adapter, self.how, self.adapts = nn.Linear(6, 9), nn.Linear(6, 9), how, True
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + (self.adapter(x) if self.adapts else 0)

    @contextmanager
    def without_adapter(self):
        self.switch(False)
        yield
        self.switch(True)

    def switch(self, on):
        self.adapts = on
        if self.how == "module":
            self.adapter.requires_grad_(on)
        for p in self.adapter.parameters():
            if self.how == "method":
                p.requires_grad_(requires_grad=on)
            elif self.how == "attribute":
                p.requires_grad = on


def distance_to_reference(model, x):
    """As losses of preferences have it: the model without its adapters is their reference."""
    with torch.no_grad(), model[0].without_adapter():
        reference = model(x)
    return F.mse_loss(model(x), 2 * reference)


def against_a_frozen_layer(model, x):
    """As adversaries are trained: a layer is frozen for one of two losses, and thawed for the other."""
    model[2].requires_grad_(False)
    first = model(x).square().mean()
    model[2].requires_grad_(True)
    return first + 0.1 * model(x + 1).cos().mean()


@pytest.mark.parametrize("loss", [distance_to_reference, against_a_frozen_layer])
@pytest.mark.parametrize("how", ["module", "method", "attribute"])
@pytest.mark.parametrize("chosen", ["all", "the adapter", "the others"])
def test_flags_that_a_loop_switches_off_and_on_count_as_in_any_loop(loss, how, chosen):
    def targets(name, parameter):
        return parameter.requires_grad and (chosen == "all" or ("adapter" in name) == (chosen == "the adapter"))

    found = []
    for make in (
        lambda m: nusam.Perturbation(m, RHO, targets=targets, power_iterations=300),
        lambda m: Wrapped(m, targets=targets, ascent="gradient", power_iterations=300),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(Adapted(how), nn.Tanh(), nn.Linear(9, 4)).double()
        chosen_first = {n for n, p in model.named_parameters() if p.requires_grad}
        perturbation, base = make(model), sgd(model)
        for step in range(5):
            base.zero_grad()
            for x, _ in perturbation.passes(*batch(step, torch.float64)):
                loss(model, x).backward()
                assert {type(copy.deepcopy(p)) for p in model.parameters()} == {nn.Parameter}
            assert {n for n, p in model.named_parameters() if p.requires_grad} == chosen_first
            base.step()
        found.append({"model": model.state_dict()})
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert_equal(*found, 1e-9)


def test_a_flag_that_stays_off_is_off_in_the_descent_and_after_it():
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    for number, (x, y) in enumerate(perturbation.passes(*batch(0, torch.float64))):
        F.cross_entropy(model(x), y).backward()
        model[0].bias.requires_grad = False
        assert number == 0 or not model[0].bias.requires_grad
    assert [p is model[0].bias for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("held", [None, torch.zeros_like, torch.ones_like], ids=["none", "zeros", "ones"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_ascent_leaves_no_gradient_and_the_descent_writes_no_weight(held, share):
    model = net()
    perturbation = nusam.Perturbation(model, RHO, ascent_share=share)
    parameters = list(model.parameters())
    fired, nodes = [], []
    for p in parameters:
        p.register_hook(lambda g: fired.append("hook"))
        p.register_post_accumulate_grad_hook(lambda p: fired.append("complete"))
        nodes.append(p.expand_as(p).grad_fn.next_functions[0][0])  # as engines find where a gradient is put
        nodes[-1].register_hook(lambda *_: fired.append("node"))
    for step in range(10):  # steps that compare, and others
        for p in parameters:
            p.grad = None if held is None else held(p)
        before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
        versions, addresses = [p._version for p in parameters], [p.data_ptr() for p in parameters]
        for i, (x, y) in enumerate(perturbation.passes(*batch(step, torch.float64))):
            fired.clear()
            F.cross_entropy(model(x), y).backward()
            if i == 0:
                assert not fired
                assert list(model.parameters()) == parameters or all(map(torch.equal, model.parameters(), parameters))
                for p, (gradient, value) in zip(parameters, before, strict=True):
                    assert p.grad is gradient
                    assert value is None or torch.equal(p.grad, value)
            else:
                assert len(fired) == 3 * len(parameters)
                assert all(p.requires_grad for p in parameters)
        assert i == 1
        assert versions == [p._version for p in parameters]
        assert addresses == [p.data_ptr() for p in parameters]
        assert all(type(p) is nn.Parameter for p in parameters)


def test_a_run_resumes_to_the_bit(tmp_path):
    make = lambda m: nusam.Perturbation(m, RHO, ascent_share=0.5)  # noqa: E731
    whole = train(net(torch.float32), make)
    torch.save(train(net(torch.float32), make, range(9)), tmp_path / "run.pt")
    model = net(torch.float32)
    resumed = train(model, make, range(9, STEPS), state=torch.load(tmp_path / "run.pt"))
    assert_equal(resumed, whole, 0)
    assert resumed["perturbation"]["steps"] == STEPS


@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_an_exception_leaves_the_weights_and_everything_else(where):
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        for i, (x, y) in enumerate(perturbation.passes(*batch(0, torch.float64))):
            if (where == "descent") == bool(i):
                model(x)
                raise KeyboardInterrupt
            F.cross_entropy(model(x), y).backward()
    weights = dict(model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert all(p.requires_grad and type(p) is nn.Parameter for p in weights.values())
    assert where == "descent" or all(p.grad is None for p in weights.values())
    assert all("forward" not in vars(module) for module in model.modules())
    for x, y in perturbation.passes(*batch(0, torch.float64)):
        F.cross_entropy(model(x), y).backward()
    assert perturbation.metrics()["epsilon/0.weight"] == pytest.approx(RHO)


def by_break(perturbation, model, x, y):
    for number, part in enumerate(perturbation.passes(x, y)):
        F.cross_entropy(model(part[0]), part[1]).backward()
        if number == perturbation.active:
            break


def by_return(perturbation, model, x, y):
    for number, part in enumerate(perturbation.passes(x, y)):
        loss = F.cross_entropy(model(part[0]), part[1])
        loss.backward()
        if number == perturbation.active:
            return loss.item()
    return None


def by_a_late_end(perturbation, model, x, y):
    passes = perturbation.passes(x, y)
    for _ in range(1 + perturbation.active):
        part = next(passes)
        F.cross_entropy(model(part[0]), part[1]).backward()
    passes.close()


@pytest.mark.parametrize("leave", [by_break, by_return, by_a_late_end])
def test_a_loop_that_leaves_a_complete_descent_takes_its_steps(leave):
    def build(model):
        return nusam.Perturbation(model, RHO, delay=2, rho_schedule=lambda step: 1 / (1 + step))

    model = net()
    perturbation, base = build(model), sgd(model)
    for step in range(6):
        torch.manual_seed(1000 * step)
        base.zero_grad()
        leave(perturbation, model, *batch(step, torch.float64))
        base.step()
        assert perturbation.state_dict()["steps"] == step + 1
    expected = net()
    train(expected, build, range(6))
    assert_equal({"model": model.state_dict()}, {"model": expected.state_dict()}, 0)


@pytest.mark.parametrize("where", ["ascent", "descent", "micro-batch"])
def test_a_loop_that_leaves_before_the_gradient_takes_no_step(where):
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    for number, (x, y) in enumerate(perturbation.passes(*batch(0, torch.float64), ends_step=where != "micro-batch")):
        loss = F.cross_entropy(model(x), y)
        if where == ("ascent", "descent")[number]:
            break
        loss.backward()
        if number == 1:
            break
    assert perturbation.state_dict()["steps"] == 0


def test_what_a_left_descent_did_not_reach_is_told_before_the_next_pass():
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    for number, (x, y) in enumerate(perturbation.passes(*batch(0, torch.float64))):
        out = model(x) if number else model[0](x)
        F.cross_entropy(out, y).backward()
        if number:
            break
    with pytest.warns(UserWarning, match="got a gradient in the descent and none in the ascent"):
        next(perturbation.passes(*batch(1, torch.float64)))


class Stepping(nn.Module):
    """An engine whose backward asks for its step, as accelerate's does."""

    def __init__(self, module):
        super().__init__()
        self.module, self.base = module, sgd(module)

    def forward(self, x):
        return self.module(x)

    def step(self):
        self.base.step()
        self.base.zero_grad()


def test_a_step_that_a_left_descent_has_asked_for_is_taken():
    from nusam.integrations.deepspeed import before_the_step

    def run(leaves):
        engine = Stepping(net())
        perturbation = nusam.Perturbation(engine, RHO)
        for step in range(3):
            torch.manual_seed(1000 * step)
            passes = perturbation.passes(*batch(step, torch.float64))
            for number, (x, y) in enumerate(before_the_step(engine, perturbation, passes)):
                F.cross_entropy(engine(x), y).backward()
                engine.step()
                if number == leaves:
                    break
        return list(engine.module.parameters())

    assert all(map(torch.equal, run(1), run(None)))
    assert all(map(torch.equal, run(0), net().parameters()))


def test_rho_may_change_and_0_leaves_one_pass():
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    assert perturbation.active
    perturbation.rho = 0
    assert (perturbation.rho, perturbation.active) == (0, False)
    assert list(perturbation.passes("batch")) == ["batch"]
    with pytest.raises(ValueError, match=r"^rho must be a finite number of at least 0, got -1\.$"):
        perturbation.rho = -1


class Beside(nn.Module):
    """A table whose weight is also multiplied, by a function of torch's or one with a backward of its own."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 6), how

    def forward(self, x):
        return self.how(self.layer(x).tanh(), self.layer.weight)


class Own(torch.autograd.Function):
    """F.linear without a bias, as fused losses have it."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, D):
        x, W = ctx.saved_tensors
        return D @ W, D.T @ x


@pytest.mark.parametrize("how", [F.linear, lambda x, W: Own.apply(x, W), lambda x, W: x + W.square().sum()])
def test_a_matrix_that_is_used_beside_its_layer_is_refused(how):
    model = Beside(how).double()
    before = copy.deepcopy(model.state_dict())
    perturbation = nusam.Perturbation(model, RHO)
    with pytest.raises(RuntimeError, match=r"layer\.weight is .*use nusam\.NuSAM around an optimizer of your own\.$"):
        for x, _ in perturbation.passes(*batch(0, torch.float64)):
            model(x).square().mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def loss_of(model):
    x, y = batch(0, torch.float64)
    return F.cross_entropy(model(x), y)


REFUSED = {
    "no backward": (lambda model: loss_of(model), "ended without a backward"),
    "a graph of gradients": (lambda model: loss_of(model).backward(create_graph=True), "create_graph=True"),
    "asked": (lambda model: torch.autograd.grad(loss_of(model), model[0].weight), "asks for the gradient"),
    "thawed": (lambda model: model.requires_grad_(True), "requires_grad of a parameter is set inside the ascent"),
    "assigned": (lambda model: [loss_of(model).backward(), assign(model)], "gives a parameter .* its gradient itself"),
    "cleared": (
        lambda model: [loss_of(model).backward(), model.zero_grad(), loss_of(model).backward()],
        "between two backwards",
    ),
}


def assign(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize(("does", "said"), REFUSED.values(), ids=REFUSED)
def test_what_needs_gradients_in_the_ascent_is_refused(does, said):
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    with pytest.raises(RuntimeError, match=rf"{said}.*[^.]\.$"):
        for _ in perturbation.passes():
            does(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a model",), r"^model must be the torch.nn.Module being trained, got str;"),
        ((nn.Tanh(),), r"^model Tanh has no trainable parameter,"),
        ((nn.LSTM(4, 4),), r"^weight_ih_l0 is held by no known layer,"),
        ((nn.LayerNorm(4),), r"^Perturbation has nothing to perturb: the model holds no trainable 2-D parameter;"),
        ((nn.Linear(4, 4), float("nan")), r"^rho must be a finite number of at least 0, got nan\.$"),
    ],
    ids=str,
)
def test_what_can_not_be_had_is_refused_at_construction(arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        nusam.Perturbation(*arguments)


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    perturbation = nusam.Perturbation(net(), RHO)
    before = perturbation.state_dict()
    for change, said in (
        (lambda s: s.pop("steps"), "has no 'steps'"),
        (lambda s: s["matrices"].update(other=s["matrices"]["0.weight"]), "'other', which the model has not"),
        (lambda s: s["matrices"]["0.weight"].update(u=torch.ones(2)), "of shape"),
        (lambda s: s.update(rho=-1), "rho must be"),
    ):
        state = copy.deepcopy(before)
        change(state)
        with pytest.raises(ValueError, match=said):
            perturbation.load_state_dict(state)
        assert str(perturbation.state_dict()) == str(before)


NO_STATES = {
    "none": lambda s: None,
    "a list": lambda s: [s],
    "steps none": lambda s: {**s, "steps": None},
    "steps a string": lambda s: {**s, "steps": "3"},
    "steps negative": lambda s: {**s, "steps": -1},
    "matrices none": lambda s: {**s, "matrices": None},
    "matrices a list": lambda s: {**s, "matrices": [1]},
    "a matrix of numbers": lambda s: {**s, "matrices": {**s["matrices"], "0.weight": {"u": [1.0] * 9}}},
    "found none": lambda s: {**s, "found": None},
    "found another": lambda s: {**s, "found": {"0.weight": "x"}},
    "found unknown": lambda s: {**s, "found": {"0.weight": "two uses: "}},
    "rho none": lambda s: {**s, "rho": None},
}


@pytest.mark.parametrize("change", NO_STATES.values(), ids=NO_STATES)
def test_what_is_no_state_is_refused_in_a_sentence_and_nothing_is_loaded(change):
    saved = train(net(), lambda m: nusam.Perturbation(m, 0.3), range(2))["perturbation"]
    perturbation = nusam.Perturbation(net(), RHO)
    before = str(perturbation.state_dict())
    with pytest.raises(ValueError, match=r"^(The state dict.*|rho must be) .*\.$"):
        perturbation.load_state_dict(change(saved))
    assert str(perturbation.state_dict()) == before


@pytest.mark.parametrize("replaced", [7, 0], ids=["the head", "the first layer"])
def test_a_layer_that_is_replaced_midway_is_perturbed(replaced):
    def run(make):
        torch.manual_seed(0)
        model = net()
        perturbation = make(model)
        for step in range(4):
            if step == 2:
                shape = (model[replaced].in_features, model[replaced].out_features)
                model[replaced] = nn.Linear(*shape).double()
                perturbation = make(model) if isinstance(perturbation, Wrapped) else perturbation
            model.zero_grad()
            torch.manual_seed(step)
            for x, y in perturbation.passes(*batch(step, torch.float64)):
                F.cross_entropy(model(x), y).backward()
        return [p.grad for p in model.parameters()]

    found = run(lambda m: nusam.Perturbation(m, RHO, power_iterations=300))
    expected = run(lambda m: Wrapped(m, power_iterations=300))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_a_share_that_is_set_is_checked_and_cuts_the_next_batch():
    perturbation = nusam.Perturbation(net(), RHO)
    perturbation.ascent_share = 0.25
    assert len(next(perturbation.passes(*batch(0, torch.float64)))[0]) == 4
    for share in (0, 2, "half", True):
        with pytest.raises(ValueError, match=r"^ascent_share must be a number above 0 and at most 1, got "):
            perturbation.ascent_share = share
    assert perturbation.ascent_share == 0.25


@pytest.mark.parametrize("make", [lambda m: nusam.Perturbation(m, RHO), Wrapped], ids=["perturbation", "NuSAM"])
def test_passes_without_autograd_are_refused_in_a_sentence(make):
    model = net()
    perturbation = make(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\), in which no backward .*\.$"):
        next(perturbation.passes())
    for _ in perturbation.passes():
        loss_of(model).backward()


def test_a_model_that_is_frozen_later_or_in_the_passes_of_another_is_refused_for_what_it_is():
    model = net()
    perturbation = nusam.Perturbation(model, RHO)
    for _ in perturbation.passes():
        with pytest.raises(RuntimeError, match=r"^A perturbation of this model is in its passes, .*\.$"):
            nusam.Perturbation(model, RHO)
        loss_of(model).backward()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model Sequential has no trainable parameter, .*\.$"):
        next(perturbation.passes())


class Between(nn.Module):
    """A matrix that may be frozen, between two others."""

    def __init__(self):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.between(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(
    "targets", ["frozen", lambda name, p: p.requires_grad and name.startswith("between")], ids=["frozen", "predicate"]
)
def test_a_step_in_which_nothing_is_left_to_perturb_has_the_plain_gradient(targets):
    torch.manual_seed(0)
    model = Between().double()
    model.between.requires_grad_(targets != "frozen")
    perturbation = nusam.Perturbation(model, RHO, targets=targets)
    for step in range(7):
        model.between.requires_grad_((targets == "frozen") == (step == 4))
        x = torch.randn(8, 6, dtype=torch.float64)
        model.zero_grad()
        names = []
        for name in perturbation.passes():
            names.append(name)
            model(x).square().mean().backward()
        if step == 4:
            assert names == ["descent"]
            trained = [p for p in model.parameters() if p.requires_grad]
            plain = torch.autograd.grad(model(x).square().mean(), trained)
            for p, gradient in zip(trained, plain, strict=True):
                torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-12)
        else:
            assert names == ["ascent", "descent"]


def test_a_frozen_base_under_adapters_is_perturbed_without_a_gradient():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(6, 9), nn.Linear(6, 2, bias=False), nn.Linear(2, 9, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    runs = []
    for make in (
        lambda m: nusam.Perturbation(m, RHO, targets="frozen"),
        lambda m: Wrapped(m, targets="frozen", ascent="matrix-free"),
    ):
        torch.manual_seed(0)
        runs.append(train(nn.Sequential(Adapted(), nn.Linear(9, 4)).double(), make))
    assert_equal(*runs, 1e-12)
