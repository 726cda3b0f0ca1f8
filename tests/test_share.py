"""With a share, ε is that of the cut batch's gradient, and the step that of the whole batch's, as done by hand."""

import copy
import itertools
import sys

import pytest
import torch
from torch import nn

import nusam
from tests.conftest import assert_unperturbed, weights

RHO, B = 0.3, 12


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.body = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.body(self.table(tokens))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def problem(steps, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net().to(dtype)
    batches = [(torch.randint(9, (B, 5)), torch.randint(3, (B,))) for _ in range(steps)]
    return model, batches


def loss_of(model, tokens, y):
    return nn.functional.cross_entropy(model(tokens), y)


def gradients(model, loss, parameters):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in parameters]


def by_hand(model, base, batches, share, kind, targets, micro_batches=1, perturbed=lambda step: True):
    """The perturbation by an SVD of the cut batch's gradient, added to copies of the weights."""
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    for step, batch in enumerate(batches):
        total = [torch.zeros_like(p) for p in parameters]
        for part in zip(*(x.chunk(micro_batches) for x in batch), strict=True):
            count = -(-len(part[0]) // round(1 / share))
            before = [p.detach().clone() for p in parameters]
            if perturbed(step):
                found = gradients(model, loss_of(model, *(x[:count] for x in part)), parameters)
                chosen = [i for i, name in enumerate(names) if targets(name, parameters[i])]
                norm = torch.cat([found[i].flatten() for i in chosen]).norm()
                with torch.no_grad():
                    for i in chosen:
                        if kind is nusam.NuSAM:
                            U, _, Vh = torch.linalg.svd(found[i], full_matrices=False)
                            parameters[i].add_(RHO * torch.outer(U[:, 0], Vh[0]))
                        else:
                            parameters[i].add_(RHO * found[i] / norm)
            for sum_, gradient in zip(total, gradients(model, loss_of(model, *part), parameters), strict=True):
                sum_.add_(gradient)
            with torch.no_grad():
                for p, old in zip(parameters, before, strict=True):
                    p.copy_(old)
        for p, sum_ in zip(parameters, total, strict=True):
            p.grad = sum_
        base.step()


WAYS = [
    (nusam.NuSAM, {"ascent": "gradient"}),
    (nusam.NuSAM, {"ascent": "matrix-free"}),
    (nusam.NuSAM, {"ascent": "matrix-free", "placement": "forward"}),
    (nusam.NuSAM, {"placement": "forward"}),
    (nusam.SAM, {}),
]


def options_of(kind, options):
    return {**options, "power_iterations": 100} if kind is nusam.NuSAM else options


def is_target(kind):
    return (lambda name, p: p.ndim == 2) if kind is nusam.NuSAM else (lambda name, p: True)


@pytest.mark.parametrize(
    ("base", "share"), [(torch.optim.SGD, 1), (torch.optim.AdamW, 1 / 3), (torch.optim.SGD, 1 / 12)]
)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_the_step_is_the_one_by_hand(kind, options, micro_batches, share, base):
    model, batches = problem(3)
    expected = copy.deepcopy(model)
    opt = kind(base(model.parameters(), lr=0.01), rho=RHO, model=model, ascent_share=share, **options_of(kind, options))
    for batch in batches:
        opt.zero_grad()
        for tokens, y in zip(*(x.chunk(micro_batches) for x in batch), strict=True):
            for part in opt.passes(tokens, y, accumulate=True):
                loss_of(model, *part).backward()
        opt.step()
    by_hand(expected, base(expected.parameters(), lr=0.01), batches, share, kind, is_target(kind), micro_batches)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)


def test_delay_resume_and_a_schedule():
    model, batches = problem(6)
    expected = copy.deepcopy(model)

    def build(net):
        base = torch.optim.AdamW(net.parameters(), lr=0.01)
        return nusam.NuSAM(base, rho=RHO, model=net, ascent_share=1 / 4, delay=2, power_iterations=100)

    opt = build(model)
    for step, (tokens, y) in enumerate(batches):
        sizes = []
        for part, labels in opt.passes(tokens, y):
            sizes.append(len(labels))
            loss_of(model, part, labels).backward()
        opt.step()
        assert sizes == ([B] if step < 2 else [3, B])
        if step == 3:
            saved = copy.deepcopy(opt.state_dict())
            opt = build(model)
            opt.load_state_dict(saved)
    base = torch.optim.AdamW(expected.parameters(), lr=0.01)
    by_hand(expected, base, batches, 1 / 4, nusam.NuSAM, is_target(nusam.NuSAM), perturbed=lambda step: step >= 2)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)


def test_frozen_targets_and_step_in_backward():
    model, batches = problem(3)
    expected = copy.deepcopy(model)
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.01), rho=RHO, model=model, ascent="matrix-free", ascent_share=1 / 4,
        power_iterations=100,
    )  # fmt: skip
    nusam.step_in_backward(opt)
    for tokens, y in batches:
        for part in opt.passes(tokens, y):
            loss_of(model, *part).backward()
        opt.step()
    by_hand(
        expected, torch.optim.SGD(expected.parameters(), lr=0.01), batches, 1 / 4, nusam.NuSAM, is_target(nusam.NuSAM)
    )
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)

    model, batches = problem(3)
    expected = copy.deepcopy(model)
    model.requires_grad_(False).head.requires_grad_(True)
    opt = nusam.NuSAM(
        torch.optim.SGD(model.head.parameters(), lr=0.1), rho=RHO, model=model, targets="frozen",
        ascent="matrix-free", ascent_share=1 / 4, power_iterations=100,
    )  # fmt: skip
    for tokens, y in batches:
        for part in opt.passes(tokens, y):
            loss_of(model, *part).backward()
        opt.step()
    base = torch.optim.SGD(expected.head.parameters(), lr=0.1)
    frozen = {"table.weight", "body.0.weight", "body.3.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    by_hand(expected, base, batches, 1 / 4, nusam.NuSAM, lambda name, p: name in frozen)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)


def test_buffers_are_those_that_the_descent_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=RHO, model=model, ascent_share=1 / 4)
    norm = model[1]
    for step in range(1, 5):
        before, seen = norm.running_mean.clone(), []
        hook = model[0].register_forward_hook(lambda m, i, y, seen=seen: seen.append(y.detach()))
        for part in opt.passes(x):
            model(part).square().mean().backward()
        hook.remove()
        opt.step()
        assert [len(y) for y in seen] == [2, 8]
        assert torch.allclose(norm.running_mean, 0.9 * before + 0.1 * seen[1].mean(0))
        assert int(norm.num_batches_tracked) == step


def test_one_argument_comes_back_as_itself_and_several_as_a_tuple():
    model, [(tokens, y)] = problem(1)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
    batch = {"tokens": tokens, "y": y}
    for given in opt.passes(batch):
        assert given is batch
        loss_of(model, **given).backward()
    for given in opt.passes(tokens, y):
        assert isinstance(given, tuple)
        assert given[0] is tokens
        assert given[1] is y
        loss_of(model, *given).backward()
    for given in opt.passes([tokens, y]):
        assert isinstance(given, list)
        loss_of(model, *given).backward()
    names = []
    for name in opt.passes():
        names.append(name)
        loss_of(model, tokens, y).backward()
    assert names == ["ascent", "descent"]


def test_an_exception_in_either_pass_leaves_the_weights_unperturbed():
    model, [(tokens, y)] = problem(1)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=RHO, model=model, ascent_share=1 / 4)
    before = weights(model)
    for fails in (0, 1):
        with pytest.raises(KeyError):
            for number, part in enumerate(opt.passes(tokens, y)):
                loss_of(model, *part).backward()
                if number == fails:
                    raise KeyError
        assert_unperturbed(model, before)
    for part in opt.passes(tokens, y):
        loss_of(model, *part).backward()
        if len(part[1]) == B:
            break
    assert_unperturbed(model, before)
    assert opt._pass is None


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "1/8", None, float("nan")])
def test_a_share_that_is_none(share):
    model, _ = problem(1)
    with pytest.raises(ValueError, match="ascent_share must be a number above 0 and at most 1"):
        nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), ascent_share=share)


def test_loops_that_hand_over_no_batch_are_refused_in_a_sentence():
    model, [(tokens, y)] = problem(1)
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent_share=1 / 8)
    before = weights(model)
    with pytest.raises(ValueError, match=r"passes\(\) without a batch .* write 'for x, y in opt.passes\(x, y\):'"):
        next(opt.passes())
    with pytest.raises(ValueError, match=r"step\(closure\) would run the whole batch .* loop over opt.passes"):
        opt.step(lambda: loss_of(model, tokens, y))
    with pytest.raises(TypeError, match=r"write passes\(accumulate=True\)"):
        next(opt.passes(True))
    with pytest.raises(TypeError, match=r"write passes\(\.\.\., accumulate=True\)"):
        next(opt.passes(tokens, y, True))
    with pytest.raises(ValueError, match="first dimension to cut"):
        next(opt.passes("a batch"))
    assert_unperturbed(model, before)
    with opt.ascent():
        loss_of(model, tokens[:2], y[:2]).backward()
    with opt.descent():
        loss_of(model, tokens, y).backward()
    opt.step()


class Opaque:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("way", ["passes", "one pass"])
def test_a_batch_that_can_not_be_cut_is_refused_before_the_delay(way):
    model, [(tokens, y)] = problem(1)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, delay=1000, ascent_share=1 / 4)
    before = weights(model)
    batch, computed = {"tokens": Opaque(tokens), "y": y}, []
    steps = opt.passes(batch) if way == "passes" else opt.one_pass([batch] * 2, computed.append)
    with pytest.raises(ValueError, match=r"can't cut a dict .* an object that can't be cut"):
        next(iter(steps))
    assert not computed
    assert_unperturbed(model, before)


def test_a_batch_is_cut_once_before_the_delay(monkeypatch):
    model, batches = problem(6)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, delay=4, ascent_share=1 / 4)
    cuts = []
    cut = nusam.stepping.first_samples
    monkeypatch.setattr(nusam.stepping, "first_samples", lambda *given: cuts.append(opt._progress.steps) or cut(*given))
    for batch in batches:
        for part in opt.passes(*batch):
            loss_of(model, *part).backward()
        opt.step()
    assert cuts == [0, 4, 5]


@pytest.mark.parametrize("kind", ["no ascent", "no radius"])
def test_a_batch_that_is_never_cut_need_not_be_such_as_can_be(kind):
    model, [(tokens, y)] = problem(1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "no ascent":
        opt = nusam.RWP(base, model=model, ascent_share=1 / 4)
    else:
        opt = nusam.NuSAM(base, rho=0, model=model, ascent_share=1 / 4)
    batch = Opaque(tokens)
    given = []
    for part in opt.passes(batch):
        given.append(part)
        loss_of(model, part.x, y).backward()
    opt.step()
    assert given == [batch]
    if kind == "no ascent":
        for _ in opt.passes():
            loss_of(model, tokens, y).backward()
        opt.step(lambda: loss_of(model, tokens, y).backward())


@pytest.mark.parametrize(("kind", "options"), [WAYS[0], WAYS[1], WAYS[2], WAYS[4]])
def test_a_share_that_leaves_nothing_to_perturb_by_is_told_once(kind, options):
    model, _ = problem(1)
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model, ascent_share=1 / 8, **options)

    def step(count):
        for part in opt.passes(torch.randint(9, (count, 5))):
            table = nn.functional.normalize(model(part), dim=-1)
            nn.functional.cross_entropy(table @ table.detach().T, torch.arange(len(part))).backward()
        opt.step()

    for _ in range(2):
        step(8)
    with pytest.warns(UserWarning, match=r"ascent_share=0\.125, leaves every ε at 0, so that the base optimizer"):
        step(8)
    for count in (8, 8, 8, 16):
        step(count)
    assert max(value for name, value in opt.metrics().items() if name.startswith("epsilon/")) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_and_a_scaler(dtype):
    model, batches = problem(3, torch.float32)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def build(net):
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        return nusam.NuSAM(base, rho=RHO, model=net, ascent="matrix-free", ascent_share=1 / 4)

    opt, cut_by_hand = build(model), build(twin)
    for tokens, y in batches:
        for part in opt.passes(tokens, y):
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, *part)
            scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        for count, half in itertools.zip_longest((3, B), (cut_by_hand.ascent, cut_by_hand.descent)):
            with half(), torch.autocast("cpu", dtype):
                loss_of(twin, tokens[:count], y[:count]).backward()
        cut_by_hand.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-3)


def test_a_compiled_model_has_two_graphs_and_no_more():
    torch._dynamo.reset()
    model, batches = problem(8, torch.float32)
    expected = copy.deepcopy(model)

    def build(net):
        base = torch.optim.SGD(net.parameters(), lr=0.05)
        return nusam.NuSAM(base, rho=RHO, model=net, ascent="matrix-free", ascent_share=1 / 4)

    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    optimizers = [(compiled, build(compiled)), (expected, build(expected))]

    def train(batches):
        for (tokens, y), (net, opt) in itertools.product(batches, optimizers):
            for part in opt.passes(tokens, y):
                loss_of(net, *part).backward()
            opt.step()

    train(batches[:5])  # the first compare layers with gradients, in graphs of their own
    with torch.compiler.set_stance("fail_on_recompile"):
        train(batches[5:])
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of exceptions are of Python 3.11")
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, nusam.Perturbation])
def test_what_a_model_raises_of_too_few_samples_names_the_share(kind):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    args = [model] if kind is nusam.Perturbation else [torch.optim.SGD(model.parameters(), lr=0.1)]
    opt = kind(*args, ascent_share=1 / 8, **({} if kind is nusam.Perturbation else {"model": model}))
    before = weights(model)
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        for x in opt.passes(torch.randn(8, 6)):
            model(x).sum().backward()
    (note,) = raised.value.__notes__
    assert "which sees a share of the batch, ascent_share=0.125; where the model needs several samples" in note
    assert_unperturbed(model, before)
    copies = []
    for x in opt.passes(torch.randn(16, 6)):
        if len(x) == 2:
            copies.append(copy.deepcopy(model))
        model(x).sum().backward()
    assert not model._forward_hooks
    for other in (model, *copies):
        with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
            other(torch.randn(1, 6))
        assert not hasattr(raised.value, "__notes__")
