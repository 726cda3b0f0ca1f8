"""One pass: nothing of a step depends on the batch behind it, nor on how often the loss is called."""

import contextlib
import copy
import dataclasses
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nusam
from tests.test_batch import Hidden, Sharing
from tests.test_one_pass import SHARE, B, assert_same, by_hand, run, two_passes, wrapped
from tests.test_one_pass_losses import mlp, plainly, samples

REFUSED = "one_pass.. can't tell the samples apart, since the model .* two passes"


def losses(build, batches, loss=plainly, **options):
    """What every step of a run came to."""
    torch.manual_seed(4)
    random.seed(4)
    model = build()
    opt = wrapped(model, power_iterations=1, **options)
    found = []
    for value in opt.one_pass(batches, lambda batch: loss(model, batch)):
        found.append(float(value))
        opt.step()
    return found


def assert_independent_of_the_next_batch(build, steps, loss=plainly, count=12):
    batches = samples(count, 6)
    expected = losses(build, batches, loss)
    for step in steps:
        changed = [*batches]
        changed[step + 1] = changed[step + 1] * 10
        assert losses(build, changed, loss)[step] == expected[step]


# ------------------------------------------------------------------------------- samples that meet


def by_paths(h):
    keep = torch.rand(len(h), 1) < 0.8
    return h + h * keep


def by_python(h):
    return 2 * h if random.random() < 0.5 else h


DRAWS = {
    "functional dropout": lambda h: h + F.dropout(h, 0.2),
    "paths": by_paths,
    "noise": lambda h: h + 0.1 * torch.randn_like(h),
    "once a call, by Python": by_python,
}


def mixed_styles(h):
    """Statistics of other samples, drawn for half of the batches."""
    if torch.rand(()) > 0.5:
        return h
    mean = h.mean(1, keepdim=True).detach()
    return h - mean + mean[torch.randperm(len(h))]


MEETINGS = {
    "the largest entry": lambda h: h / h.detach().abs().amax(),
    "how many they are": lambda h: h / len(h),
    "their mean": lambda h: h - h.detach().mean(0),
    "mixed styles": mixed_styles,
}


class Drawing(nn.Module):
    def __init__(self, draw, meet=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.draw, self.meet = nn.Linear(6, 12), nn.Linear(12, 3), draw, meet
        self.double()

    def forward(self, x):
        return self.down(self.meet(self.draw(torch.tanh(self.up(x)))))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.filterwarnings("error")
def test_a_model_that_draws_for_each_sample_takes_one_pass(draw):
    model = Drawing(DRAWS[draw])
    opt = wrapped(model, power_iterations=1)
    run(opt, model, samples(6, 6), plainly)
    assert not opt._one_pass._refused


@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("draw", DRAWS)
def test_samples_that_meet_without_a_gradient_are_seen_whatever_is_drawn(draw, meeting):
    if (draw, meeting) == ("once a call, by Python", "how many they are"):
        pytest.skip("what one side draws depends on whether the other one does")
    with pytest.warns(UserWarning, match=REFUSED):
        assert_independent_of_the_next_batch(lambda: Drawing(DRAWS[draw], MEETINGS[meeting]), (3, 6))


class Confident(nn.Module):
    """Keeps a number of all its samples, which the loss reads."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        y = self.net(x)
        self.spread = y.detach().std()
        return y


def by_an_attribute(model, x):
    return plainly(model, x) * (1 + model.spread)


def test_a_number_of_all_samples_that_the_loss_reads_is_seen():
    with pytest.warns(UserWarning, match=REFUSED):
        assert_independent_of_the_next_batch(Confident, (3, 6), by_an_attribute)


class Thawing(nn.Module):
    """Batch norm that is frozen at first."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 12), norm, nn.Linear(12, 3)
        self.double()
        self.norm.eval()

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_what_changes_its_mode_is_looked_at_in_the_next_step(momentum):
    def found(batches):
        model = Thawing(nn.BatchNorm1d(12, momentum=momentum))
        opt = wrapped(model, power_iterations=1)
        values = []
        for value in opt.one_pass(batches, lambda x: plainly(model, x)):
            values.append(float(value))
            opt.step()
            if len(values) == 10:
                model.train()
        return values

    batches = samples(13, 6)
    with pytest.warns(UserWarning, match=REFUSED):
        expected = found(batches)
    for step in (10, 11):
        changed = [*batches[: step + 1], batches[step + 1] * 10, *batches[step + 2 :]]
        with pytest.warns(UserWarning, match=REFUSED):
            assert found(changed)[step] == expected[step]


# ------------------------------------------------------------------------------- NaN behind


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def masked(model, batch):
    """0/0 where no sample counts."""
    x, counts = batch
    errors = model(x).square().mean(1) * counts
    return errors.sum() / counts.sum()


def infinite(model, batch):
    x, counts = batch
    return model(x).square().mean() / counts.sum().clamp(max=1)


@pytest.mark.parametrize("loss", [masked, infinite])
@pytest.mark.parametrize("place", [4, 5, 6])
def test_a_loss_behind_that_is_not_finite_leaves_nothing_in_the_step_before(loss, place):
    counts = [torch.ones(B, dtype=torch.float64) for _ in range(8)]
    batches = list(zip(samples(8, 6), counts, strict=True))
    model, without = Normed(), Normed()
    gradients = []
    for one, behind in ((model, 0.0), (without, 1.0)):
        counts[place][: int(B * SHARE)] = behind
        opt = wrapped(one, power_iterations=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step, value in enumerate(opt.one_pass(batches, lambda batch, one=one: loss(one, batch))):
                assert value.isfinite()
                assert all(p.grad.isfinite().all() for p in one.parameters())
                if step == place - 1:
                    gradients.append([p.grad.clone() for p in one.parameters()])
                opt.step()
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


# ------------------------------------------------------------------------------- whose ε it is


def test_an_epsilon_serves_the_batch_that_it_was_found_on_and_no_other():
    """A loop is broken off, as at a limit of steps; two take turns."""
    first, second = samples(10, 6)[:5], samples(10, 6)[5:]
    model, expected = mlp(), mlp()
    opt, twin = wrapped(model), wrapped(expected)
    for step, _ in enumerate(opt.one_pass(first, lambda x: plainly(model, x))):
        opt.step()
        if step == 2:
            break
    for _ in twin.one_pass(first[:3], lambda x: plainly(expected, x)):
        twin.step()
    run(opt, model, second, plainly)
    run(twin, expected, second, plainly)
    assert_same(model, expected)

    for batches in zip(first, second, strict=True):
        two_passes(twin, expected, batches, plainly)
    turns = [opt.one_pass(batches, lambda x: plainly(model, x)) for batches in (first, second)]
    for _ in first:
        for turn in turns:
            next(turn)
            opt.step()
    assert_same(model, expected)


# ------------------------------------------------------------------------------- what another optimizer takes


def matrices_and_rest(model):
    return [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim < 2]


@pytest.mark.parametrize("clear", ["before", "after", "never"])
@pytest.mark.parametrize("share", [1, SHARE])
@pytest.mark.parametrize("way", ["passes", "one pass"])
def test_only_the_descent_adds_to_gradients_that_another_optimizer_takes(way, share, clear):
    """As Muon takes the matrices and AdamW the rest."""
    model, expected, batches = Normed(), Normed(), samples(8, 6)
    matrices, rest = matrices_and_rest(model)
    opt = nusam.NuSAM(torch.optim.SGD(matrices, lr=0.1), 0.05, model=model, ascent_share=share, power_iterations=250)
    other = torch.optim.SGD(rest, lr=0.1)
    whole = nusam.NuSAM(
        torch.optim.SGD(expected.parameters(), lr=0.1), 0.05, model=expected, ascent_share=share, power_iterations=250
    )
    sums = [torch.zeros_like(p) for p in matrices_and_rest(expected)[1]]

    def compare():
        """The joint optimizer's gradients are this step's; those of the rest may add up."""
        for p, total, q in zip(rest, sums, matrices_and_rest(expected)[1], strict=True):
            total.mul_(clear == "never").add_(q.grad)
            torch.testing.assert_close(p.grad, total, rtol=1e-9, atol=1e-12)

    def step():
        whole.step()
        opt.step()
        with torch.no_grad():
            for p, q in zip(rest, matrices_and_rest(expected)[1], strict=True):
                p.copy_(q)
        if clear == "after":
            other.zero_grad()

    if way == "passes":
        for x in batches:
            if clear == "before":
                other.zero_grad()
            for part in opt.passes(x):
                plainly(model, part).backward()
            for part in whole.passes(x):
                plainly(expected, part).backward()
            compare()
            step()
        return
    if clear == "before":
        pytest.skip("the loop's body comes after the backward")
    theirs = whole.one_pass(batches, lambda x: plainly(expected, x))
    for _ in opt.one_pass(batches, lambda x: plainly(model, x)):
        next(theirs)
        compare()
        step()


@pytest.mark.parametrize("order", ["in turn", "together", "contexts"])
def test_two_optimizers_of_ours_share_a_model(order):
    model, expected, batches = Normed(), Normed(), samples(4, 6)
    halves = [list(model.up.parameters()), [*model.norm.parameters(), *model.down.parameters()]]
    opts = [
        nusam.NuSAM(torch.optim.SGD(half, lr=0.1), 0.05, model=model, ascent="gradient", power_iterations=250)
        for half in halves
    ]
    whole = nusam.NuSAM(torch.optim.SGD(expected.parameters(), lr=0.1), 0.05, model=expected, power_iterations=250)
    if order == "in turn":
        for x in batches:
            for opt in opts:
                for _ in opt.passes():
                    plainly(model, x).backward()
                opt.step()
                assert all(p.grad is not None for p in model.parameters())
        return
    for x in batches:
        if order == "together":
            for _ in zip(*(opt.passes() for opt in opts), strict=True):
                plainly(model, x).backward()
        else:
            with opts[0].ascent(), opts[1].ascent():
                plainly(model, x).backward()
            with opts[0].descent(), opts[1].descent():
                plainly(model, x).backward()
        for opt in opts:
            opt.step()
        for _ in whole.passes():
            plainly(expected, x).backward()
        whole.step()
    assert_same(model, expected)


# ------------------------------------------------------------------------------- a batch is handed out several times


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


def divides(model, batch):
    x, y = batch["x"], batch["y"]
    x.div_(4)
    return (model(x) - y).square().mean()


def divides_untold(model, batch):
    batch["x"].data.div_(4)
    return (model(batch["x"]) - batch["y"]).square().mean()


def divides_by_numpy(model, batch):
    batch["x"].numpy()[...] /= 4
    return (model(batch["x"]) - batch["y"]).square().mean()


def gives_other_memory(model, batch):
    batch["x"].data = batch["x"].data / 4
    return (model(batch["x"]) - batch["y"]).square().mean()


def pops(model, batch):
    y = batch["y"]["inner"].pop("y")
    return (model(batch["x"]) - y).square().mean()


def binds(model, batch):
    batch.x = batch.x / 4
    return (model(batch.x) - batch.y).square().mean()


def binds_inside(model, batch):
    batch[0]["x"] = batch[0]["x"] / 4
    return (model(batch[0]["x"]) - batch[1]).square().mean()


def appends(model, batch):
    batch.append(1)
    assert len(batch) == 3
    return (model(batch[0]) - batch[1]).square().mean()


def binds_in_an_object(model, batch):
    batch["scale"].by /= 4
    return (model(batch["x"] * batch["scale"].by) - batch["y"]).square().mean()


def plain(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


HANDED = {
    "written": (lambda x, y: {"x": x, "y": y}, divides, 4),
    "written through .data": (lambda x, y: {"x": x, "y": y}, divides_untold, 4),
    "written by numpy": (lambda x, y: {"x": x, "y": y}, divides_by_numpy, 4),
    "other memory": (lambda x, y: {"x": x, "y": y}, gives_other_memory, 4),
    "taken out": (lambda x, y: {"x": x, "y": {"inner": {"y": y}}}, pops, 1),
    "bound": (Sample, binds, 4),
    "bound inside": (lambda x, y: ({"x": x}, y), binds_inside, 4),
    "grown": (lambda x, y: [x, y], appends, 1),
    "bound in an object": (lambda x, y: {"x": x, "y": y, "scale": SimpleNamespace(by=1.0)}, binds_in_an_object, 4),
}


@pytest.mark.parametrize("share", [1, SHARE])
@pytest.mark.parametrize(("kind", "is_served"), [(Sharing, True), (Hidden, False)])
def test_a_mapping_that_shares_its_entries_with_its_copy_is_not_changed(kind, is_served, share):
    model, expected, batches = mlp(), mlp(), samples(5, 6)
    given = [kind(x=x, n=1) for x in batches]
    opt = wrapped(model, share=share)

    def loss(model, batch):
        return plainly(model, batch["x"])

    if is_served:
        run(opt, model, given, loss)
        by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly, share)
        assert_same(model, expected)
    else:
        with pytest.raises((TypeError, ValueError), match=r"A Hidden .* hand over .*\.$"):
            run(opt, model, given, loss)
        assert opt._pass is None
    assert all(batch["x"] is x for batch, x in zip(given, batches, strict=True))


@pytest.mark.parametrize("share", [1, SHARE, 1 / B])
@pytest.mark.parametrize("way", ["passes", "one pass"])
@pytest.mark.parametrize("how", HANDED)
@pytest.mark.filterwarnings("error")
def test_every_call_finds_the_batch_as_the_first_one_did(how, way, share):
    make, loss, divisor = HANDED[how]
    model, expected = mlp(), mlp()
    pairs = [(x, torch.full((B, 3), 0.5, dtype=torch.float64)) for x in samples(6, 6)]
    pairs.append((pairs[0][0][:1], pairs[0][1][:1]))  # a share of one sample is that sample
    opt, twin = wrapped(model, share=share), wrapped(expected, share=share)
    batches = [make(x.clone(), y) for x, y in pairs]
    others = [(x / divisor, y) for x, y in pairs]
    if way == "passes":
        two_passes_of = ((opt, model, batches, loss), (twin, expected, others, plain))
        for one, of, given, computed in two_passes_of:
            two_passes(one, of, given, lambda of, batch, computed=computed: computed(of, batch))
    else:
        run(opt, model, batches, loss)
        run(twin, expected, others, plain)
    assert_same(model, expected)


@pytest.mark.parametrize("way", ["passes", "one pass"])
def test_a_batch_that_is_first_written_in_a_later_step_is_refused(way):
    model, batches, calls = mlp(), samples(12, 6), []

    def loss(model, x):
        calls.append(x)
        if len(calls) > 24:
            x.mul_(2)
        return plainly(model, x)

    with pytest.raises(RuntimeError, match="wrote into a tensor of its batch, which it had not done before"):
        (two_passes if way == "passes" else run)(wrapped(model), model, [*batches, *samples(12, 6)], loss)


def test_a_loader_that_writes_over_its_last_batch_is_refused():
    def loader():
        x = torch.empty(B, 6, dtype=torch.float64)
        for batch in samples(4, 6):
            yield x.copy_(batch), 1

    model = mlp()
    with pytest.raises(ValueError, match="the loader has written into the tensors of the batch before"):
        run(wrapped(model), model, loader(), lambda model, batch: plainly(model, batch[0]))


# ------------------------------------------------------------------------------- what the process has set

SETTING = [0]


@contextlib.contextmanager
def setting():
    before = SETTING[0]
    SETTING[0] += 1
    try:
        yield
    finally:
        SETTING[0] = before


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def forked():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


CONTEXTS = {
    "a setting": (setting, lambda: SETTING[0]),
    "warnings": (quietly, lambda: [entry[0] for entry in warnings.filters]),
    "the generator": (forked, lambda: torch.get_rng_state().tolist()),
    "flags": (lambda: torch.backends.opt_einsum.flags(enabled=False), lambda: torch.backends.opt_einsum.enabled),
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_around_the_model_leave_the_process_as_it_was(name, calls):
    context, look = CONTEXTS[name]
    model = mlp()

    def loss(x):
        value = 0
        for _ in range(calls):
            with context():
                y = model(x)
            value = value + (y - 1).square().mean()
        return value

    opt = wrapped(model, power_iterations=1)
    before = None
    for _ in opt.one_pass(samples(6, 6), loss):
        opt.step()
        before = before or look()
        assert look() == before
    assert not opt._one_pass._refused


# ------------------------------------------------------------------------------- arguments that are no samples


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.down = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        self.double()

    def forward(self, x, mask):
        return self.down(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize(("count", "share"), [(B, 1), (1, 1), (1, 1 / 8), (4, 1)])
@pytest.mark.filterwarnings("error")
def test_one_tensor_for_both_sides_is_no_sample_however_long_it_is(count, share):
    mask = torch.triu(torch.ones(B, B, dtype=torch.bool), 1)
    model, expected = Causal(), Causal()
    batches = [x[:count] for x in samples(6, B, 6)]

    def loss(model, x):
        return (model(x, mask) - 1).square().mean()

    run(wrapped(model, share=share), model, batches, loss)
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, loss, share)
    assert_same(model, expected)


@pytest.mark.parametrize("share", [1, SHARE])
@pytest.mark.filterwarnings("error")
def test_the_same_batch_may_come_again_and_again(share):
    model, expected, batches = mlp(), mlp(), samples(1, 6) * 6
    run(wrapped(model, share=share), model, batches, plainly)
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly, share)
    assert_same(model, expected)


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: torch.Tensor
    ids: list


class Named(nn.Module):
    """Gets names of its samples, and hands them on."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, ids):
        assert len(ids) == len(x)
        return Slotted(self.net(x), ids)


@pytest.mark.filterwarnings("error")
def test_lists_of_samples_travel_with_them():
    model, expected, batches = Named(), mlp(), samples(6, 6)
    named = [{"x": x, "ids": [f"{number}.{i}" for i in range(B)]} for number, x in enumerate(batches)]

    def loss(model, batch):
        found = model(batch["x"], batch["ids"])
        assert found.ids == batch["ids"]
        return (found.logits - 1).square().mean(0, keepdim=True).mean(1)

    run(wrapped(model), model, named, loss)
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), batches, plainly)
    assert_same(model.net, expected)


# ------------------------------------------------------------------------------- calls that are refused


def calls_backward(model, batch):
    value = plainly(model, batch[0])
    value.backward()
    return value


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        (lambda x, y: (x, y), None, r"goes through the batches itself and was given one of them, a tuple"),
        (lambda x, y: {"x": x}, None, r"goes through the batches itself and was given one of them, a dict"),
        (lambda x, y: x, None, r"goes through the batches itself and was given one of them, a Tensor"),
        (lambda x, y: 3, None, r"goes through the batches itself and was given none, a int"),
        (lambda x, y: [(x, y)], nn.CrossEntropyLoss(), r"must be a function of a batch .* got CrossEntropyLoss"),
        (lambda x, y: [(x, y)], lambda x, y: 0, r"must be a function of a batch .* got a function of other arguments"),
        (lambda x, y: [(x, y)], 7, r"must be a function of a batch .* got a int"),
        (lambda x, y: [(x, y)], "backward", r"must leave the backward to one_pass\(\)"),
    ],
)
def test_a_call_that_can_not_be_meant_is_refused_in_one_sentence(batches, loss, match):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    opt = wrapped(model)
    x, y = samples(2, 6)
    one = loss or (lambda batch: plainly(model, batch[0]))
    if loss == "backward":
        one = lambda batch: calls_backward(model, batch)  # noqa: E731
    with pytest.raises((TypeError, RuntimeError), match=match):
        next(iter(opt.one_pass(batches(x, y[:, 0]), one)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert opt._pass is None
