"""A compiled model in one pass: one graph for the step, and the steps are those by hand.

One sample behind gives a gradient of rank one to a layer that it passes once, whose top pair one iteration finds.
"""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from tests.test_one_pass import Attentive, B, assert_same, bases, by_hand, mean, run, token_batches, two_passes, wrapped


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Rows(nn.Module):
    """Layers that a sample passes once, a norm, and an offset that is the same for all."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)
        self.places, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.register_buffer("one", torch.ones(1, 5))

    def forward(self, x):
        x = x + self.places(self.one.to(x.dtype))
        return self.head(x + self.down(torch.tanh(self.norm(self.up(x)))))


def made():
    torch.manual_seed(0)
    return Rows().double()


def batches(count, size=B):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss(model, x):
    return (model(x) - 1).square().mean()


WAYS = {
    "around": lambda model, **options: torch.compile(model, dynamic=False, **options),
    "in place": lambda model, **options: model.compile(dynamic=False, **options) or model,
}


@pytest.mark.parametrize(  # every two of them
    ("way", "backend", "base"),
    [
        ("around", "eager", "SGD"),
        ("in place", "eager", "AdamW"),
        pytest.param("around", "aot_eager", "AdamW", marks=pytest.mark.slow),
        pytest.param("in place", "aot_eager", "SGD", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_steps_and_the_steps_by_hand(way, backend, base):
    model, expected, data = made(), made(), batches(14)
    compiled = WAYS[way](model, backend=backend, fullgraph=True)
    opt = wrapped(compiled, base, share=1 / 8, power_iterations=1)
    graphs, carried = [], []
    for _ in opt.one_pass(data, lambda x: loss(compiled, x)):
        graphs.append(counters["stats"]["unique_graphs"])
        carried.append(bool(opt._waiting))
        opt.step()
    assert not opt._one_pass._refused
    assert carried == [False, *[True] * 12, False]
    assert graphs[1:-1] == [graphs[1]] * 12  # those of the ascent, and one for a step
    assert graphs[-1] <= graphs[1] + 1  # the last batch travels alone
    assert not counters["graph_break"]
    by_hand(expected, bases()[base](expected), data, loss, 1 / 8)
    assert_same(model, expected)


@pytest.mark.slow
def test_accumulation():
    model, expected, data = made(), made(), batches(12)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    opt = wrapped(compiled, share=1 / 8, power_iterations=1)
    opt.zero_grad()
    for number, _ in enumerate(opt.one_pass(data, lambda x: loss(compiled, x), accumulate=True), 1):
        if number % 2 == 0:
            opt.step()
            opt.zero_grad()
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), data, loss, 1 / 8, micro_batches=2)
    assert_same(model, expected)


class Blocks(nn.Module):
    """Of which one is compiled."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 9)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.block(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at inputs
@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_block_alone_is_compiled(iterations):
    def trained(compiles):
        torch.manual_seed(0)
        model = Blocks().double()
        if compiles:
            model.block.compile(backend="aot_eager", dynamic=False)
        opt = wrapped(model, power_iterations=iterations)
        run(opt, model, token_batches(10), mean)
        assert not opt._one_pass._refused
        return model

    assert_same(trained(True), trained(False))


class Untied(Attentive):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


@pytest.mark.parametrize("kind", [Attentive, Untied])
def test_what_a_graph_does_not_hand_out_takes_two_passes(kind):
    torch.manual_seed(0)
    model, twin = kind().double(), kind().double()
    twin.load_state_dict(model.state_dict())
    data = token_batches(6)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    opt, plain = wrapped(compiled, power_iterations=1), wrapped(twin, power_iterations=1)
    with pytest.warns(UserWarning, match=r"is compiled; from now on every step takes two passes \(a graph does not"):
        run(opt, compiled, data, mean)
    two_passes(plain, twin, data, mean)
    assert_same(model, twin)


def test_samples_that_mix_are_seen_in_a_compiled_model_too():
    class Whitens(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Whitens(), nn.Linear(8, 3)).double()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    with pytest.warns(UserWarning, match="computes a sample from others in its batch; from now on"):
        run(wrapped(compiled, power_iterations=1), compiled, batches(5), lambda model, x: model(x).square().mean())


def test_an_exception_leaves_a_model_that_was_compiled_in_place_as_it_was():
    model, data, calls = made(), batches(6), []
    model.compile(backend="eager", dynamic=False)
    graph = model._compiled_call_impl

    def interrupted(x):
        calls.append(x)
        if len(calls) == 9:
            raise KeyError
        return loss(model, x)

    with pytest.raises(KeyError):
        for _ in wrapped(model, power_iterations=1).one_pass(data, interrupted):
            pass
    assert model._compiled_call_impl is graph
    assert "_call_impl" not in vars(model)
