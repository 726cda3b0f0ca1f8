"""One pass a step with models and losses that samples which travel together could notice, or write over."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nusam
from tests.conftest import assert_unperturbed, weights
from tests.test_one_pass import B, assert_same, by_hand, run, two_passes, wrapped


def samples(count, *shape):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(B, *shape, generator=generator, dtype=torch.float64) + 0.5 for _ in range(count)]


def mlp(hook=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    if hook:
        model[2].weight.register_hook(hook)
    return model


def plainly(model, x):
    return (model(x) - 1).square().mean()


# ------------------------------------------------------------------------------- they travel together


def scaled_in_place(model, x):
    """Logits over a temperature."""
    y = model(x)
    y /= 0.5
    y -= 1
    return y.square().mean()


class Centred(nn.Module):
    """Its input is written in place, and an activation between two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        x -= 0.5
        x /= 2
        return self.down(F.relu_(self.up(x)))


def of_a_copy(model, x):
    return plainly(model, x.clone())


class Cross(nn.Module):
    """Queries of one half of the positions, keys and values of the other; or an attention to itself."""

    def __init__(self, itself=False, **options):
        super().__init__()
        self.itself = itself
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x):
        keys = x if self.itself else x[:, 2:]
        return self.attention(x if self.itself else x[:, :2], keys, keys)[0]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, :2], x[:, 2:])


RIDING = {
    "logits in place": (mlp, scaled_in_place, (6,)),
    "the input in place": (Centred, of_a_copy, (6,)),
    "cross-attention": (Cross, plainly, (5, 6)),
    "cross-attention of keys of their own": (lambda: Cross(kdim=6, vdim=6), plainly, (5, 6)),
    "self-attention": (lambda: Cross(itself=True), plainly, (5, 6)),
    "a transformer's decoder": (Decoder, plainly, (5, 6)),
}


@pytest.mark.parametrize("name", RIDING)
@pytest.mark.filterwarnings("error")
def test_samples_that_do_not_meet_travel_together(name):
    build, loss, shape = RIDING[name]
    torch.manual_seed(0)
    model = build().double()
    expected = copy.deepcopy(model)
    batches = samples(8, *shape)
    run(wrapped(model), model, batches, loss)
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, loss)
    assert_same(model, expected)


@pytest.mark.filterwarnings("error")
def test_a_loss_may_take_entries_out_of_its_batch():
    model, expected, batches = mlp(), mlp(), samples(8, 6)

    def loss(batch):
        return plainly(model, batch.pop("x"))

    opt = wrapped(model)
    for _ in opt.one_pass([{"x": x, "name": "a"} for x in batches], loss):
        opt.step()
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly)
    assert_same(model, expected)


# ------------------------------------------------------------------------------- they don't


def fgsm(model, x):
    """A step against an input gradient that torch.autograd.grad gives inside the loss."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plainly(model, x), x)
    return plainly(model, (x + 0.1 * gradient.sign()).detach())


@pytest.mark.parametrize(("hook", "loss"), [(torch.tril, plainly), (None, fgsm)], ids=["hook", "fgsm"])
def test_what_takes_two_passes_takes_them_from_the_first_step_on(hook, loss):
    model, twin, batches = mlp(hook), mlp(hook), samples(8, 6)
    opt, plain = wrapped(model), wrapped(twin, ascent="gradient")
    with pytest.warns(UserWarning, match="one_pass.. can't tell the samples apart, since .* two passes"):
        run(opt, model, batches, loss)
    two_passes(plain, twin, batches, loss)
    assert_same(model, twin)


def test_a_penalty_on_an_input_gradient_may_begin_midway():
    """What a matrix is then used for beside its layer is found when it is compared next."""
    model, batches, counted = mlp(), samples(12, 6), iter(range(10**6))

    def loss(model, x):
        x = x.clone().requires_grad_()
        y = model(x)
        if next(counted) < 30:
            return (y - 1).square().mean()
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y - 1).square().mean() + gradient.square().mean()

    with pytest.warns(UserWarning, match="one_pass.. can't tell the samples apart, since .* two passes"):
        run(wrapped(model, power_iterations=1), model, batches, loss)
    assert next(counted) > 30


@pytest.mark.parametrize("how", ["reached late", "a new group"])
def test_a_new_target_has_its_epsilon_after_one_step(how):
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(6, 12), "head": nn.Linear(12, 3), "late": nn.Linear(12, 3)}).double()
    trained = [*model["body"].parameters(), *model["head"].parameters()]
    if how == "reached late":
        trained += model["late"].parameters()
    opt = nusam.NuSAM(torch.optim.SGD(trained, lr=0.1), rho=0.1, model=model, ascent_share=1 / 2)
    steps = iter(range(10**6))
    reached = False

    def loss(x):
        h = model["body"](x).tanh()
        return (model["head"](h) + (model["late"](h) if reached else 0) - 1).square().mean()

    without = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, _ in zip(steps, opt.one_pass(samples(16, 6), loss), strict=False):
            opt.step()
            if step > 9 and not opt.metrics().get("epsilon/late.weight"):
                without.append(step)
            if step == 9:
                reached = True
                if how == "a new group":
                    opt.add_param_group({"params": list(model["late"].parameters())})
    assert without in ([10], [10, 11])


# ---------------------------------------------------------------- losses that raise


def failing_at(model, call, error, where):
    """A loss and a backward of which one call raises, and none after it; how often they were called."""
    calls = []

    def counted(value, place):
        if place == where:
            calls.append(value)
            if len(calls) == call:
                raise error
        return value

    return (
        calls,
        lambda x: counted(plainly(model, x), "loss"),
        lambda loss: counted(loss, "backward").backward(),
    )


@pytest.mark.parametrize("where", ["loss", "backward"])
@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_an_error_rises_from_whichever_call_it_comes_and_changes_nothing(where, first):
    kinds = [AssertionError, IndexError, KeyError, RuntimeError, ValueError, torch.OutOfMemoryError]
    calls, loss, backward = failing_at(model := mlp(), 0, None, where)
    list(wrapped(model).one_pass(samples(3, 6), loss, backward=backward))
    assert len(calls) > 5
    for call in range(first, len(calls) + 1, 4):
        model = mlp()
        opt, before, kind = wrapped(model), weights(model), kinds[call % len(kinds)]
        _, loss, backward = failing_at(model, call, kind("once"), where)
        with pytest.raises(kind, match="once"):
            list(opt.one_pass(samples(3, 6), loss, backward=backward))
        assert_unperturbed(model, before)
        assert not opt._refused


@pytest.mark.parametrize("kind", [StopIteration, AssertionError, ZeroDivisionError, ValueError])
@pytest.mark.parametrize("number", range(4))
def test_an_error_of_one_batch_rises(number, kind):
    model, batches = mlp(), samples(4, 6)

    def loss(x):
        if x[0, 0] == batches[number][0, 0]:
            raise kind("no label")
        return plainly(model, x)

    before, opt = weights(model), wrapped(model)
    with pytest.raises(RuntimeError if kind is StopIteration else kind) as raised:  # as any generator says it
        for _ in opt.one_pass(batches, loss):
            pass
    assert "no label" in str(raised.value.__cause__ if kind is StopIteration else raised.value)
    assert_unperturbed(model, before)


@pytest.mark.parametrize("error", [AssertionError, KeyError, NotImplementedError, ValueError, ZeroDivisionError])
def test_an_error_that_comes_of_travelling_together_is_told_and_takes_two_passes(error):
    class Strict(nn.Sequential):
        def forward(self, x):
            if len(x) > B:
                raise error("at most\n8 samples")
            return super().forward(x)

    model, batches = Strict(*mlp()), samples(6, 6)
    twin = copy.deepcopy(model)
    opt, plain = wrapped(model), wrapped(twin)
    with pytest.warns(UserWarning, match=f"{error.__name__}: .*at most.*8 samples.*; from now on every step takes two"):
        run(opt, model, batches, plainly)
    two_passes(plain, twin, batches, plainly)
    assert_same(model, twin)


class TwoHeads(nn.Module):
    """One for each task, both of which run."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return torch.stack([head(h) for head in self.heads], 1)


def stepped(opt, steps):
    for _ in steps:
        opt.step()


def test_a_matrix_that_a_batch_is_the_first_to_reach_is_told_of_in_the_words_of_one_pass():
    torch.manual_seed(0)
    model = TwoHeads().double()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, ascent_share=1 / 4)
    batches = [(torch.randn(8, 6, dtype=torch.float64), task) for task in (0, 0, 0, 0, 1, 1, 0, 1)]
    steps = opt.one_pass(batches, lambda batch: model(batch[0])[:, batch[1]].square().mean())
    with pytest.warns(UserWarning, match="step before") as told:
        stepped(opt, steps)
    said = [str(warning.message) for warning in told if "got a gradient" in str(warning.message)]
    assert said == [
        "heads.1.weight got a gradient in the descent and none where its ε would have been found, with the step "
        "before, and was not perturbed in this step; it is perturbed from the next step on."
    ]
