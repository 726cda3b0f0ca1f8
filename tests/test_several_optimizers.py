"""Several optimizers of ours over parts of one model, whose passes run at once, held to a loop by hand."""

import copy
import warnings
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import nusam

RHO = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3)
        self.middle, self.scale, self.down = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.drop(torch.tanh(self.norm(self.up(x))))
        return self.down(self.scale(torch.tanh(self.middle(hidden))))


def matrices_and_the_rest(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [(nusam.NuSAM, matrices), (nusam.SAM, [p for p in model.parameters() if p.ndim < 2])]


def the_rest_and_matrices(model):
    return matrices_and_the_rest(model)[::-1]


def body_and_head(model):
    head = [*model.scale.parameters(), *model.down.parameters()]
    return [(nusam.NuSAM, [p for p in model.parameters() if all(p is not q for q in head)]), (nusam.NuSAM, head)]


def three(model):
    weights = [model.up.weight, model.middle.weight, model.down.weight]
    rest = [p for p in model.parameters() if all(p is not q for q in weights)]
    return [(nusam.NuSAM, weights[1:]), (nusam.NuSAM, weights[:1]), (nusam.SAM, rest)]


SPLITS = [matrices_and_the_rest, the_rest_and_matrices, body_and_head, three]
OPTIONS = {
    "gradient": {"ascent": "gradient"},
    "matrix-free": {"ascent": "matrix-free"},
    "forward": {"ascent": "matrix-free", "placement": "forward"},
}


def base(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def build(model, split, options, **more):
    """The optimizers of a split."""
    made = []
    for kind, parameters in split(model):
        own = {**options, "power_iterations": 500} if kind is nusam.NuSAM else {}
        made.append(kind(base(parameters), RHO, model=model, **own, **more))
    return made


def by_zip(opts, backward, strict=False):
    for _ in zip(*(opt.passes() for opt in opts), strict=strict):
        backward()


def by_strict_zip(opts, backward):
    by_zip(opts, backward, strict=True)


def by_contexts(opts, backward):
    for half in ("ascent", "descent"):
        with ExitStack() as stack:
            for opt in opts if half == "ascent" else opts[::-1]:
                stack.enter_context(getattr(opt, half)())
            backward()


WAYS = [by_zip, by_strict_zip, by_contexts]


def loss_of(model, x):
    return (model(x) - 1.5).square().mean()


def samples(steps):
    generator = torch.Generator().manual_seed(1)
    return [1 + torch.randn(16, 6, generator=generator, dtype=torch.float64) for _ in range(steps)]


def epsilons(kind, parameters):
    """Of one optimizer, by its gradients."""
    if kind is nusam.SAM:
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        return {p: RHO * p.grad / norm for p in parameters}
    found = {}
    for p in parameters:
        if p.ndim == 2:
            U, _, Vh = torch.linalg.svd(p.grad)
            found[p] = RHO * torch.outer(U[:, 0], Vh[0])
    return found


def step_by_hand(model, parts, bases, x):
    generator, before = torch.get_rng_state(), copy.deepcopy(list(model.buffers()))
    model.zero_grad()
    loss_of(model, x).backward()
    found = {}
    for kind, parameters in parts:
        found |= epsilons(kind, parameters)
    after = copy.deepcopy(list(model.buffers()))
    torch.set_rng_state(generator)
    clean = {p: p.detach().clone() for p in found}
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        for p, epsilon in found.items():
            p.add_(epsilon)
    model.zero_grad()
    loss_of(model, x).backward()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), after, strict=True):
            buffer.copy_(value)
        for p, value in clean.items():
            p.copy_(value)
    for optimizer in bases:
        optimizer.step()


def assert_same(model, expected):
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def assert_nothing_left(model, run):
    assert torch.autograd._engine_run_backward is run
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_passes_that_run_at_once_are_those_of_one_loop(split, options, way):
    torch.manual_seed(0)
    model = Net().double()
    expected = copy.deepcopy(model)
    run = torch.autograd._engine_run_backward
    opts = build(model, split, OPTIONS[options])
    parts = split(expected)
    bases = [base(parameters) for _, parameters in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, x in enumerate(samples(5)):
            torch.manual_seed(k)
            way(opts, lambda x=x: loss_of(model, x).backward())
            drawn = torch.get_rng_state()
            for opt in opts:
                opt.step()
            torch.manual_seed(k)
            step_by_hand(expected, parts, bases, x)
            assert torch.equal(drawn, torch.get_rng_state())
            assert_same(model, expected)
            assert_nothing_left(model, run)
    assert model.norm.num_batches_tracked == 5
    for opt in opts:
        assert not [name for name in opt.metrics() if "fallback" in name]


@pytest.mark.parametrize("kind", [nusam.GSAM, nusam.WSAM])
def test_the_second_of_two_mixes_its_gradients_though_zip_drops_it(kind):
    found = []
    for strict in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        first = nusam.NuSAM(base(model.up.parameters()), RHO, model=model, ascent="matrix-free")
        rest = [p for name, p in model.named_parameters() if not name.startswith("up.")]
        opts = [first, kind(base(rest), RHO, model=model)]
        for x in samples(3):
            by_zip(opts, lambda x=x, model=model: loss_of(model, x).backward(), strict)
            for opt in opts:
                opt.step()
        found.append(model)
    assert_same(*found)


@pytest.mark.parametrize("where", ["ascent", "descent"])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_exception_in_passes_that_run_at_once(options, where):
    model = Net().double()
    run = torch.autograd._engine_run_backward
    opts = build(model, three, OPTIONS[options])
    x = samples(1)[0]
    for _ in range(3):  # the third is served
        by_zip(opts, lambda: loss_of(model, x).backward())
    before = copy.deepcopy(dict(model.named_parameters()))
    names = iter(["ascent", "descent"])

    def fails():
        loss_of(model, x).backward()
        if next(names) == where:
            raise ValueError("in the body")

    with pytest.raises(ValueError, match="in the body"):
        by_zip(opts, fails)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-12)
    assert_nothing_left(model, run)
    by_zip(opts, lambda: loss_of(model, x).backward())
    for opt in opts:
        opt.step()


@pytest.mark.parametrize("late", [0, 1])
def test_unequal_numbers_of_passes_are_refused(late):
    model = Net().double()
    opts = [
        kind(base(parameters), RHO, model=model, delay=2 * (i == late))
        for i, (kind, parameters) in enumerate(matrices_and_the_rest(model))
    ]
    by_zip(opts, lambda: loss_of(model, samples(1)[0]).backward())
    with pytest.raises(RuntimeError, match="unequal numbers of passes"):
        for opt in opts:
            opt.step()


def test_a_backward_after_the_pass_around_has_ended_is_refused():
    model = Net().double()
    first, second = build(model, body_and_head, {"ascent": "gradient"})
    outer, inner = first.ascent(), second.ascent()
    outer.__enter__()
    inner.__enter__()
    loss = loss_of(model, samples(1)[0])
    loss.backward(retain_graph=True)
    outer.__exit__(None, None, None)
    loss.backward()
    with pytest.raises(RuntimeError, match="after the pass around it had ended"):
        inner.__exit__(None, None, None)


def test_a_matrix_that_two_hold_is_refused():
    model = Net().double()
    opts = [nusam.NuSAM(base(model.parameters()), RHO, model=model, ascent="matrix-free") for _ in range(2)]
    with pytest.raises(RuntimeError, match="held by another whose passes run at once"):
        by_zip(opts, lambda: loss_of(model, samples(1)[0]).backward())
    assert not any("forward" in vars(module) for module in model.modules())


def test_two_that_reach_into_one_layer_are_refused():
    model = nn.MultiheadAttention(4, 2).double()
    halves = [[model.in_proj_weight], [model.out_proj.weight]]
    opts = [nusam.NuSAM(base(half), RHO, model=model, ascent="matrix-free") for half in halves]
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="reach into the same layer"):
        by_zip(opts, lambda: model(x, x, x)[0].square().mean().backward())
    assert not any("forward" in vars(module) for module in model.modules())
