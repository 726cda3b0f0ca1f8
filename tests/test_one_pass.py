"""One pass a step equals two passes by hand: ε by an SVD, one update old, on samples that it is used on."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import nusam
from tests.conftest import assert_unperturbed, weights

RHO, B, SHARE = 0.05, 8, 1 / 4


class Attentive(nn.Module):
    """An embedding, positions, torch's attention, norms, and a head tied to the table."""

    def __init__(self, checkpoints=None):
        super().__init__()
        self.table, self.positions = nn.Embedding(9, 6), nn.Embedding(5, 6)
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.out = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight
        self.checkpoints = checkpoints

    def block(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.body(x)

    def features(self, tokens):
        x = self.table(tokens) + self.positions(torch.arange(tokens.shape[1]))
        if self.checkpoints is None:
            return self.out(self.block(x))
        return self.out(checkpoint(self.block, x, use_reentrant=self.checkpoints == "re-entrant"))

    def forward(self, tokens):
        return self.head(self.features(tokens))


class WithItsLoss(nn.Module):
    """A model that returns its own loss, as those of Hugging Face do: the loss has no rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Attentive(), nn.Linear(9, 9)

    def forward(self, tokens):
        logits = self.head(self.inner(tokens))
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), "logits": logits}


def token_batches(count, dtype=None):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, (B, 5), generator=generator) for _ in range(count)]


def mean(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def summed(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / 30


def weighted(model, tokens):
    """A mean over the tokens that count, of which every sample has another number."""
    counts = (tokens[:, 1:] > 2).to(next(model.parameters()).dtype).flatten()
    losses = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * counts).sum() / counts.sum()


def own(model, tokens):
    return model(tokens)["loss"]


def by_hand(model, base, batches, loss, share=SHARE, stale=1, micro_batches=1, delay=0, carries=None):
    """Two passes a step, the first at the weights before the last update; only the first perturbed steps are fresh."""
    parameters = list(model.parameters())
    waiting = None

    def gradients(batch):
        found = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def ascent(batch):
        found = []
        for p, gradient in zip(parameters, gradients(batch[: -int(-len(batch) * share // 1)]), strict=True):
            if p.ndim == 2:
                U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
                found.append(RHO * torch.outer(U[:, 0], Vh[0]))
            else:
                found.append(torch.zeros_like(p))
        return found

    for step in range(0, len(batches), micro_batches):
        total = [torch.zeros_like(p) for p in parameters]
        for number in range(step, step + micro_batches):
            perturbed = step >= delay
            epsilon = (ascent(batches[number]) if waiting is None else waiting) if perturbed else None
            # the very first perturbed pass finds out how the model treats its samples, and carries none
            rides = perturbed and number > delay and number + 1 < len(batches) and (carries is None or carries[number])
            waiting = ascent(batches[number + 1]) if rides and stale else None
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, e in zip(parameters, epsilon or total, strict=True):
                    p.add_(e if epsilon else 0)
            found = gradients(batches[number])
            with torch.no_grad():
                for p, old, sum_, gradient in zip(parameters, before, total, found, strict=True):
                    p.copy_(old)
                    sum_.add_(gradient)
        for p, gradient in zip(parameters, total, strict=True):
            p.grad = gradient
        base.step()


def built(kind=Attentive, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = kind(**options).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.3)
    return model


class MuonBesideAdamW(torch.optim.Optimizer):
    """As Muon is used: it takes the matrices, AdamW the rest."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.both = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3, eps=1e-4)]
        super().__init__([group for opt in self.both for group in opt.param_groups], {})

    def step(self, closure=None):
        for opt in self.both:
            opt.step()


def bases():
    return {
        "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4),
        **({"Muon": MuonBesideAdamW} if hasattr(torch.optim, "Muon") else {}),  # since PyTorch 2.9
    }


def wrapped(model, base="SGD", share=SHARE, **options):
    options = {"power_iterations": 250, **options}
    return nusam.NuSAM(bases()[base](model), rho=RHO, model=model, ascent_share=share, **options)


def run(opt, model, batches, loss, **options):
    for value in opt.one_pass(batches, lambda batch: loss(model, batch), **options):
        assert value.ndim == 0
        assert not value.requires_grad
        opt.step()


def two_passes(opt, model, batches, loss):
    """What it is when samples can't travel together."""
    for batch in batches:
        for part in opt.passes(batch):
            loss(model, part).backward()
        opt.step()


def assert_same(model, expected, tolerance=1e-9):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


class InPlace(nn.Module):
    """Activations and residuals that overwrite what a layer gave."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9)

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.down(F.gelu(F.relu(self.up(x), inplace=True))).add_(x)
        logits = self.head(x)
        logits += 1
        return logits


def over_the_last_token(model, tokens):
    """Of inputs without a dimension between, and written into."""
    logits = model(tokens[:, 0])
    logits *= 2
    return F.cross_entropy(logits, tokens[:, 1])


CASES = {
    "mean": (Attentive, {}, mean),
    "sum": (Attentive, {}, summed),
    "token-weighted mean": (Attentive, {}, weighted),
    "its own loss": (WithItsLoss, {}, own),
    "in place": (InPlace, {}, mean),
    "in place, of one token": (InPlace, {}, over_the_last_token),
    "checkpoint": (Attentive, {"checkpoints": "plain"}, mean),
    "re-entrant checkpoint": (Attentive, {"checkpoints": "re-entrant"}, mean),
}


@pytest.mark.parametrize(
    ("case", "base"),
    [
        pytest.param(case, base, marks=[] if base == "AdamW" or case == "mean" else [pytest.mark.slow])
        for case in CASES
        for base in bases()
    ],
)
def test_it_equals_two_passes_by_hand(case, base):
    kind, options, loss = CASES[case]
    model = built(kind, **options)
    expected = built(kind)
    batches = token_batches(12)
    opt = wrapped(model, base)
    run(opt, model, batches, loss)
    by_hand(expected, bases()[base](expected), batches, loss)
    assert_same(model, expected)
    control = built(kind)
    by_hand(control, bases()[base](control), batches, loss, stale=0)
    with pytest.raises(AssertionError):  # an ε that is fresh in every step is another algorithm
        assert_same(control, expected)


@pytest.mark.parametrize("share", [1, 1 / 2, 1 / 8])
def test_shares(share):
    model, expected, batches = built(), built(), token_batches(8)
    run(wrapped(model, share=share), model, batches, mean)
    by_hand(expected, bases()["SGD"](expected), batches, mean, share)
    assert_same(model, expected)


def test_one_forward_and_one_backward_a_step():
    model, batches = built(), token_batches(20)
    opt = wrapped(model, power_iterations=1)
    calls, backwards = [], []
    model.body[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    model.body[0].bias.register_hook(lambda gradient: backwards.append(1))
    counted = []
    for _ in opt.one_pass(batches, lambda batch: mean(model, batch)):
        opt.step()
        counted.append((tuple(calls), len(backwards)))
        calls.clear()
        backwards.clear()
    assert counted[0][0] == (2, 8)  # two passes
    assert counted[-1] == ((8,), 1)  # the last batch has nothing behind it
    assert counted[6] == counted[10] == counted[12] == ((10,), 1)


def test_accumulation():
    model, expected, batches = built(), built(), token_batches(12)
    opt = wrapped(model)
    opt.zero_grad()
    for number, _ in enumerate(opt.one_pass(batches, lambda batch: mean(model, batch), accumulate=True), 1):
        if number % 2 == 0:
            opt.step()
            opt.zero_grad()
    by_hand(expected, bases()["SGD"](expected), batches, mean, micro_batches=2)
    assert_same(model, expected)


def test_a_delay_and_the_end_of_an_epoch():
    model, expected, batches = built(), built(), token_batches(10)
    run(wrapped(model, delay=3), model, batches, mean)
    by_hand(expected, bases()["SGD"](expected), batches, mean, delay=3)
    assert_same(model, expected)


@pytest.mark.parametrize("epoch", [12, 4], ids=["an ε waits", "at the end of an epoch"])
def test_a_resumed_run_is_the_same_bit_for_bit(epoch):
    model, batches = built(dtype=torch.float32), token_batches(12)
    opt = wrapped(model, "AdamW", power_iterations=1)
    last = 6 if epoch == 12 else 7
    states, taken = [], 0
    for first in range(0, 12, epoch):
        for _ in opt.one_pass(batches[first : first + epoch], lambda batch: mean(model, batch)):
            opt.step()
            if taken == last:
                states = copy.deepcopy([model.state_dict(), opt.state_dict()])
            taken += 1
    again = built(dtype=torch.float32)
    resumed = wrapped(again, "AdamW", power_iterations=1)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    run(resumed, again, batches[last + 1 :], mean)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("where", ["loss", "backward", "body", "behind"])
def test_an_exception_leaves_the_weights_and_later_steps_alone(where):
    model, batches = built(), token_batches(9)
    opt = wrapped(model, power_iterations=1)
    calls = 0

    def loss(batch):
        nonlocal calls
        calls += 1
        value = mean(model, batch)
        if calls >= 12 and where == ("loss" if len(batch) == B else "behind"):
            raise KeyError
        return value

    def backward(value):
        if calls >= 12 and where == "backward":
            raise KeyError
        value.backward()

    before = weights(model)
    with pytest.raises(KeyError):
        for _ in opt.one_pass(batches, loss, backward=backward):
            before = weights(model)
            if where == "body" and calls > 12:
                raise KeyError
            opt.step()
            before = weights(model)
    assert_unperturbed(model, before)
    assert not any("_call_impl" in vars(module) or "forward" in vars(module) for module in model.modules())
    assert opt._pass is None
    run(opt, model, batches, mean)


def mixing():
    yield "batch norm", nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    class Whitens(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    yield "a mean over the batch", nn.Sequential(nn.Linear(5, 8), Whitens(), nn.Linear(8, 3))
    yield "and at its input", nn.Sequential(Whitens(), nn.Linear(5, 3))

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.other(F.linear(self.layer(x), self.layer.weight))

    yield "a weight that is read", Reads()

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(1, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x.T[..., None]))).mean(0)

    yield "positions before samples", SequenceFirst()

    class Meets(nn.Module):
        """In a number through which no gradient passes."""

        def __init__(self, of):
            super().__init__()
            self.up, self.down, self.of = nn.Linear(5, 4), nn.Linear(4, 3), of

        def forward(self, x):
            return self.down(self.of(torch.tanh(self.up(x))))

    yield "the largest entry, as a quantizer scales by it", Meets(lambda h: h / h.detach().abs().amax())
    yield "how many they are", Meets(lambda h: h / len(h))
    yield "their mean, detached", Meets(lambda h: h - h.detach().mean(0))
    yield "their mean, behind dropout", nn.Sequential(nn.Dropout(0.5), Meets(lambda h: h - h.detach().mean(0)))


@pytest.mark.parametrize(("name", "model"), list(mixing()), ids=[name for name, _ in mixing()])
def test_where_samples_are_not_told_apart_it_takes_two_passes_and_says_so(name, model):
    model = copy.deepcopy(model).double()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(B, 5, generator=generator, dtype=torch.float64) for _ in range(8)]

    def loss(model, x):
        return model(x).square().mean()

    opt, plain = wrapped(model), wrapped(twin)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="one_pass.. can't tell the samples apart, since the model .* two passes"):
        run(opt, model, batches, loss)
    torch.manual_seed(3)
    two_passes(plain, twin, batches, loss)
    assert_same(model, twin)


@pytest.mark.parametrize(("name", "model"), list(mixing()), ids=[name for name, _ in mixing()])
@pytest.mark.parametrize("by", ["a state", "a copy"])
def test_a_resumed_run_that_takes_two_passes_goes_on_in_two_and_says_so_again(name, model, by):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(B, 5, generator=generator) for _ in range(10)]

    def loss(model, x):
        return model(x).square().mean()

    opt = wrapped(model, "AdamW", power_iterations=1)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="every step takes two passes"):
        run(opt, model, batches[:6], loss)
    again, resumed = copy.deepcopy((model, opt))
    if by == "a state":
        resumed = wrapped(again, "AdamW", power_iterations=1)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.manual_seed(4)
    run(opt, model, batches[6:], loss)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match=f"since the model {opt._refused}; from now on every step") as told:
        run(resumed, again, batches[6:], loss)
    assert len(told) == 1
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_weights_that_are_read_in_several_places_are_one_reason_and_one_warning():
    """As where a loss penalizes them all."""
    model, expected, batches = built(), built(), token_batches(6)

    def penalized(model, tokens):
        return mean(model, tokens) + 0.01 * sum(p.square().sum() for p in model.parameters())

    opt = wrapped(model)
    with pytest.warns(UserWarning, match="every step takes two passes") as told:
        run(opt, model, batches, penalized)
    assert len(told) == 1
    by_hand(expected, bases()["SGD"](expected), batches, penalized, stale=0)
    assert_same(model, expected)


def test_a_state_that_does_not_tell_of_two_passes_is_looked_at_anew():
    (_, model), *_ = mixing()
    batches = torch.randn(6, B, 5).unbind()
    with pytest.warns(UserWarning, match="every step takes two passes"):
        run(opt := wrapped(model), model, batches, lambda model, x: model(x).square().mean())
    state = opt.state_dict()
    for group in state["param_groups"]:
        assert group.pop("nusam_one_pass_refused") == opt._refused
    resumed = wrapped(model)
    resumed.load_state_dict(state)
    assert not resumed._refused
    with pytest.warns(UserWarning, match="every step takes two passes"):
        run(resumed, model, batches, lambda model, x: model(x).square().mean())
    assert resumed._refused


class Blocks(nn.Module):
    """Whose blocks meet one by one, given positions that are as long as the batch."""

    def __init__(self):
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(9, 6), Placing(), nn.Linear(6, 9)
        self.register_buffer("places", torch.arange(5.0)[:, None].cos().expand(5, 6))

    def forward(self, tokens):
        logits = self.head(self.block(self.table(tokens), places=self.places[: tokens.shape[1]]))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Placing(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x, places):
        return x + torch.tanh(self.up(x + places))


@pytest.mark.parametrize("kind", [Attentive, Blocks])
@pytest.mark.parametrize("lengths", [(3, 4, 5), (5, 5, 4), (5, 5, 5, 5, 5, 3)])
def test_a_step_whose_batches_differ_in_length_carries_nothing_and_says_so_once(kind, lengths):
    model, expected = built(kind), built(kind)
    batches = [tokens[:, : lengths[i % len(lengths)]] for i, tokens in enumerate(token_batches(12))]
    loss = mean if kind is Attentive else lambda model, tokens: model(tokens)
    opt = wrapped(model)
    with pytest.warns(UserWarning, match=r"change from batch to batch; such a step is followed by one of two") as told:
        run(opt, model, batches, loss)
    assert len(told) == 1
    assert not opt._one_pass._refused
    carries = [batches[i].shape == batches[i + 1].shape for i in range(len(batches) - 1)] + [False]
    by_hand(expected, bases()["SGD"](expected), batches, loss, carries=carries)
    assert_same(model, expected)


class Decorated(WithItsLoss):
    """As accelerate prepares a model: one autocast for all calls of its forward, which remembers what was before."""

    def __init__(self):
        super().__init__()
        self.forward = torch.autocast("cpu", torch.bfloat16)(super().forward)


@pytest.mark.parametrize("around", [False, True])
def test_an_autocast_that_both_losses_enter_is_left_by_both(around):
    model, twin = built(Decorated, dtype=torch.float32), built(WithItsLoss, dtype=torch.float32)
    batches = token_batches(8)
    opt = wrapped(model, power_iterations=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        for _ in opt.one_pass(batches, lambda batch: own(model, batch)):
            assert torch.is_autocast_enabled("cpu") == around
            opt.step()
    assert not opt._one_pass._refused
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), batches, own)
    assert_same(model, twin, 0.03)


@pytest.mark.parametrize("calls", [1, 2])
def test_what_a_loss_sets_for_the_process_is_its_own(calls):
    """Two losses in turns leave their contexts in any order: each finds what it has set, and nothing is left behind."""
    model, batches = built(dtype=torch.float32), token_batches(8)
    outside, inside = set(), set()

    def look(found):
        found.add((torch.get_default_dtype(), torch.backends.cuda.math_sdp_enabled()))

    @contextlib.contextmanager
    def double():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def loss(batch):
        value = torch.zeros((), dtype=torch.float64)
        for _ in range(calls):
            look(outside)
            with double(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                look(inside)
                logits = model.body(torch.ones(len(batch), 6, dtype=torch.float32))
                look(inside)
            value = value + logits.square().mean()
        return value

    opt = wrapped(model, power_iterations=1, targets=lambda name, p: name.startswith("body"))
    for _ in opt.one_pass(batches, loss):
        opt.step()
    assert not opt._one_pass._refused
    look(outside)
    assert outside == {(torch.float32, True)}
    assert inside == {(torch.float64, False)}


def test_what_is_refused():
    model, batches = built(), token_batches(3)
    for option in ({"placement": "weights"}, {"ascent": "gradient"}):
        opt = wrapped(model, **option)
        with pytest.raises(ValueError, match=rf"one_pass\(\) needs.*{next(iter(option))}="):
            next(opt.one_pass(batches, lambda batch: mean(model, batch)))
    with pytest.raises(ValueError, match="rank-one"):
        opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        next(opt.one_pass(batches, lambda batch: mean(model, batch)))
    with pytest.raises(ValueError, match="model="):
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
        next(opt.one_pass(batches, lambda batch: mean(model, batch)))
    with pytest.raises(TypeError, match="must return a tensor with one value"):
        next(wrapped(model).one_pass(batches, lambda batch: model(batch)))
    assert list(wrapped(model).one_pass([], lambda batch: mean(model, batch))) == []


def test_metrics_are_those_of_the_epsilon_that_the_step_had():
    model, batches = built(), token_batches(6)
    opt = wrapped(model, rho_schedule=lambda step: 1 / (step + 1))
    for step, _ in enumerate(opt.one_pass(batches, lambda batch: mean(model, batch))):
        found = opt.metrics()
        assert found["epsilon/body.0.weight"] == pytest.approx(RHO / (step + 1))
        assert 1e-6 < found["sigma/body.0.weight"] < 10
        opt.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_a_scaler(dtype):
    model, twin = built(dtype=torch.float32), built(dtype=torch.float32)
    batches = token_batches(8)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model, ascent_share=SHARE)

    def loss(batch):
        with torch.autocast("cpu", dtype):
            return mean(model, batch)

    def run():
        for _ in opt.one_pass(batches, loss, backward=lambda value: scaler.scale(value).backward()):
            scaler.step(opt)
            scaler.update()

    if dtype == torch.float16:
        with pytest.warns(UserWarning, match="computes in float16"):
            run()
    else:
        run()
        assert not opt._one_pass._refused
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches, mean, stale=dtype != torch.float16)
    assert_same(model, twin, 0.02)


def test_a_compiled_model_takes_two_passes():
    torch._dynamo.reset()
    model, expected, batches = built(), built(), token_batches(4)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with pytest.warns(UserWarning, match="the model is compiled; from now on every step takes two passes"):
        run(wrapped(compiled, power_iterations=1), compiled, batches, mean)
    two_passes(wrapped(expected, power_iterations=1), expected, batches, mean)
    assert_same(model, expected)
