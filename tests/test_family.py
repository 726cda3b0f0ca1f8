"""Twenty steps of every method beside νSAM equal its formula in ``nusam.reference``, around several base optimizers."""

import copy
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import nusam
from nusam import reference
from nusam.targets import mixed
from tests.conftest import assert_unperturbed, loss_of, mlp, train_step, weights

STEPS, DELAY, RHO = 20, 3, 0.07
BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
}


class ByHand:
    """One method's formula: ε from (w, g), and the step's gradient from (g, ĝ)."""

    two_passes = True

    def is_perturbed(self, age):
        return True

    def epsilon(self, w, g, age):
        return reference.sam(g, RHO)

    def gradient(self, g, g_hat):
        return g_hat

    def alone(self, g):
        return g


class ASAM(ByHand):
    def epsilon(self, w, g, age):
        return reference.asam(w, g, RHO, 0.01)


class VaSSO(ByHand):
    d = None

    def epsilon(self, w, g, age):
        self.d = reference.vasso(self.d or [torch.zeros_like(x) for x in g], g, 0.4)
        return reference.sam(self.d, RHO)


class FriendlySAM(ByHand):
    m = None

    def epsilon(self, w, g, age):
        d, self.m = reference.friendly(self.m, g, 0.8, 0.6)
        return reference.sam(d, RHO)


class USAM(ByHand):
    def epsilon(self, w, g, age):
        return [RHO * x for x in g]


class SSAM(ByHand):
    def epsilon(self, w, g, age):
        if age % 4 == 0:
            self.mask = reference.ssam_mask(g, 0.7)
        return [m * x for m, x in zip(self.mask, reference.sam(g, RHO), strict=True)]


class RWP(ByHand):
    two_passes = False

    def epsilon(self, w, g, age):
        seed = mixed(0, age + DELAY)
        e = [torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(seed + i)) for i, x in enumerate(w)]
        return reference.rwp(w, e, RHO)


class MixedRWP(RWP):
    two_passes = True

    def gradient(self, g, g_hat):
        return reference.weighted(g, g_hat, 0.3)


class GSAM(ByHand):
    def gradient(self, g, g_hat):
        return reference.gsam(g, g_hat, 0.4)


class WSAM(ByHand):
    def gradient(self, g, g_hat):
        return reference.weighted(g, g_hat, 0.9 / (1 - 0.9))


class LookSAM(ByHand):
    def is_perturbed(self, age):
        return age % 4 == 0

    def gradient(self, g, g_hat):
        self.v = reference.look_back_kept(g, g_hat)
        return g_hat

    def alone(self, g):
        return reference.look_back(g, self.v, 0.7)


METHODS = {
    "ASAM": (ASAM, lambda base, **more: nusam.ASAM(base, RHO, **more)),
    "VaSSO": (VaSSO, lambda base, **more: nusam.VaSSO(base, RHO, theta=0.4, **more)),
    "FriendlySAM": (FriendlySAM, lambda base, **more: nusam.FriendlySAM(base, RHO, sigma=0.8, lmbda=0.6, **more)),
    "USAM": (USAM, lambda base, **more: nusam.USAM(base, RHO, **more)),
    "SSAM": (SSAM, lambda base, **more: nusam.SSAM(base, RHO, sparsity=0.7, refresh=4, **more)),
    "RWP": (RWP, lambda base, **more: nusam.RWP(base, RHO, **more)),
    "m-RWP": (MixedRWP, lambda base, **more: nusam.RWP(base, RHO, mixture=0.3, **more)),
    "GSAM": (GSAM, lambda base, **more: nusam.GSAM(base, RHO, **more)),
    "WSAM": (WSAM, lambda base, **more: nusam.WSAM(base, RHO, **more)),
    "LookSAM": (LookSAM, lambda base, **more: nusam.LookSAM(base, RHO, every=4, **more)),
}
each_method = pytest.mark.parametrize("method", METHODS)


def gradients(model, step):
    model.zero_grad()
    loss_of(model, step).backward()
    return [p.grad.clone() for p in model.parameters()]


def by_hand(model, base, hand, steps, micro=1):
    """Copy the weights, perturb, differentiate, copy back, step; micro-batches are steps of the data."""
    for step in range(steps):
        age, total = step - DELAY, None
        for k in range(micro):
            w = weights(model)
            g = gradients(model, step * micro + k)
            if age >= 0 and hand.is_perturbed(age):
                with torch.no_grad():
                    for p, e in zip(model.parameters(), hand.epsilon(w, g, age), strict=True):
                        p += e
                g_hat = gradients(model, step * micro + k)
                with torch.no_grad():
                    for p, old in zip(model.parameters(), w, strict=True):
                        p.copy_(old)
                g = hand.gradient(g, g_hat)
            elif age >= 0:
                g = hand.alone(g)
            total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
        for p, x in zip(model.parameters(), total, strict=True):
            p.grad = x
        base.step()


def assert_same(model, expected):
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)


def twins(base="sgd"):
    model = mlp(torch.float64)
    expected = copy.deepcopy(model)
    return model, expected, BASES[base](expected.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("with_model", [True, False])
@each_method
def test_twenty_steps_equal_the_formula(method, base, with_model):
    hand, make = METHODS[method]
    model, expected, alone = twins(base)
    opt = make(BASES[base](model.parameters()), delay=DELAY, **({"model": model} if with_model else {}))
    for step in range(STEPS):
        assert opt.active == (step >= DELAY and hand().is_perturbed(step - DELAY))
        train_step(model, opt, step)
        assert opt.metrics()["rho"] == RHO
    by_hand(expected, alone, hand(), STEPS)
    assert_same(model, expected)


@each_method
def test_a_closure_does_the_same(method):
    hand, make = METHODS[method]
    model, expected, alone = twins()
    opt = make(BASES["sgd"](model.parameters()), delay=DELAY)
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        opt.step(closure)
    by_hand(expected, alone, hand(), STEPS)
    assert_same(model, expected)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "SSAM"])
def test_micro_batches_add_up(method):
    hand, make = METHODS[method]
    model, expected, alone = twins()
    opt = make(BASES["sgd"](model.parameters()), delay=DELAY)
    for step in range(STEPS):
        opt.zero_grad()
        for k in range(3):
            for _ in opt.passes(accumulate=True):
                loss_of(model, 3 * step + k).backward()
        opt.step()
    by_hand(expected, alone, hand(), STEPS, micro=3)
    assert_same(model, expected)


@each_method
@pytest.mark.parametrize("at", [5, 8])
def test_a_resumed_run_is_the_same_to_the_bit(method, at, tmp_path):
    _, make = METHODS[method]
    model, other, _ = twins("adamw")
    opt = make(BASES["adamw"](model.parameters()), delay=DELAY)
    for step in range(STEPS):
        if step == at:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
        train_step(model, opt, step)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed = make(BASES["adamw"](other.parameters()), delay=DELAY)
    resumed.load_state_dict(saved["opt"])
    for step in range(at, STEPS):
        train_step(other, resumed, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@each_method
@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_an_exception_leaves_nothing_behind(method, where):
    _, make = METHODS[method]
    model, _, _ = twins()
    opt = make(BASES["sgd"](model.parameters()))
    train_step(model, opt)
    before = weights(model)
    passes = 0
    with pytest.raises(KeyError, match="broken"):
        for name in opt.passes():
            passes += 1
            loss_of(model).backward()
            if name == where or name == "descent":
                raise KeyError("broken")
    assert_unperturbed(model, before)
    for step in range(3):
        train_step(model, opt, step)


@each_method
def test_both_halves_in_every_step_equal_the_formula(method):
    """Also in steps that need no ascent: what one leaves there counts for nothing."""
    hand, make = METHODS[method]
    model, expected, alone = twins()
    opt = make(BASES["sgd"](model.parameters()), delay=DELAY)
    for step in range(STEPS):
        with opt.ascent():
            loss_of(model, step).backward()
        with opt.descent():
            loss_of(model, step).backward()
        opt.step()
    by_hand(expected, alone, hand(), STEPS)
    assert_same(model, expected)


@each_method
def test_batches_that_are_not_finite_and_skipped_leave_no_trace(method):
    nan, inf = float("nan"), float("inf")
    skipped = {DELAY: (nan, True), DELAY + 4: (inf, False), DELAY + 6: (nan, False), DELAY + 8: (inf, True)}
    hand, make = METHODS[method]
    model, expected, alone = twins()
    opt = make(BASES["sgd"](model.parameters()), delay=DELAY)
    for step in range(STEPS):
        if step in skipped:
            before, (bad, everywhere) = weights(model), skipped[step]
            for _ in opt.passes():
                (loss_of(model, 99) * (bad if everywhere else 1)).backward()
                model[0].bias.grad[3] = bad
            opt.zero_grad()
            assert_unperturbed(model, before, rho=0)
        train_step(model, opt, step)
    by_hand(expected, alone, hand(), STEPS)
    assert_same(model, expected)


def test_an_ascent_that_no_descent_followed_does_not_count_later():
    model, _, _ = twins()
    opt = nusam.LookSAM(BASES["sgd"](model.parameters()), RHO, every=4)
    for step in range(4):
        train_step(model, opt, step)
    with opt.ascent():
        loss_of(model, 4).backward()
    opt.step()  # the descent is left out
    before = {p: s["v"].clone() for p, s in opt._states.items()}
    train_step(model, opt, 5)
    assert all(torch.equal(opt._states[p]["v"], v) for p, v in before.items())


@pytest.mark.parametrize(("every", "expected"), [(1, 20), (4, 13), (5, 12), (50, 11)])
def test_look_back_runs_no_pass_that_it_does_not_need(every, expected):
    """A peer's runs its closure for both passes in every step, and so saves nothing."""
    model, _, _ = twins()
    opt = nusam.LookSAM(BASES["sgd"](model.parameters()), every=every)
    calls = itertools.count()

    def closure():
        next(calls)
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(10):
        opt.step(closure)
    assert next(calls) == expected


class Table(nn.Module):
    """A table and complex weights, held as such or as pairs of numbers, before a layer that is perturbed."""

    def __init__(self, sparse, is_complex):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 6, sparse=sparse), nn.Linear(6, 2)
        pairs = 0.3 * torch.randn(6, 6, 2)
        self.mixed = nn.Parameter(torch.view_as_complex(pairs) if is_complex else pairs)
        self.double()
        if is_complex:
            self.mixed.data = self.mixed.data.to(torch.complex128)

    def forward(self, rows):
        matrix = self.mixed if self.mixed.is_complex() else torch.view_as_complex(self.mixed)
        return self.last((self.table(rows).to(matrix.dtype) @ matrix.conj()).abs())


@pytest.mark.parametrize("method", ["GSAM", "WSAM", "LookSAM", "m-RWP"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_sparse_and_complex_gradients_beside_the_perturbed_ones_are_combined_as_numbers(method, accumulate):
    trained = []
    for sparse, is_complex in [(True, False), (False, True), (True, True), (False, False)]:
        torch.manual_seed(0)
        model = Table(sparse, is_complex)
        groups = [{"params": model.last.parameters()}, {"params": [model.table.weight, model.mixed], "rho": 0.0}]
        opt = METHODS[method][1](torch.optim.SGD(groups, lr=0.1))
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            opt.zero_grad()
            for _ in range(2 if accumulate else 1):
                rows = torch.randint(0, 9, (4,), generator=generator)  # some twice, some not at all
                for _ in opt.passes(accumulate=accumulate):
                    model(rows).square().mean().backward()
            assert model.table.weight.grad.is_sparse == sparse
            opt.step()
        trained.append([p.detach() for p in (model.table.weight, model.last.weight, model.mixed)])
    for others in trained[:-1]:
        for a, b in zip(others, trained[-1], strict=True):
            torch.testing.assert_close(torch.view_as_real(a) if a.is_complex() else a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["GSAM", "WSAM", "LookSAM", "m-RWP"])
def test_both_gradients_are_of_the_same_samples(method):
    make = METHODS[method][1]
    model, _, _ = twins()
    sentence = "mixes the gradients of both passes, which must be of the same samples, got ascent_share=0.125; use"
    with pytest.raises(ValueError, match=sentence):
        make(BASES["sgd"](model.parameters()), ascent_share=1 / 8)
    opt = make(BASES["sgd"](model.parameters()))
    before = weights(model)
    opt.ascent_share = 1 / 8
    with pytest.raises(ValueError, match=sentence):
        next(opt.passes(torch.ones(8, 6)))
    with pytest.raises(ValueError, match=sentence), opt.ascent():
        pass
    assert_unperturbed(model, before, rho=0)


@pytest.mark.parametrize("sparsity", ["0.1", "0.3", "0.45", "0.5", "0.7", "0.9", "0.95"])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("entries", [1, 7, 10, 20, 100, 1000])
def test_a_mask_keeps_as_many_entries_as_are_left_and_the_largest(sparsity, scale, entries):
    w = nn.Parameter(torch.zeros(entries))
    opt = nusam.SSAM(torch.optim.SGD([w], lr=0.0), RHO, sparsity=float(sparsity))
    slopes = scale * torch.randperm(entries).add(1)
    for name in opt.passes():
        (slopes * w).sum().backward()
        if name == "descent":
            kept = slopes[w.detach() != 0]
    left = -(-(1 - Fraction(sparsity)) * entries // 1)
    assert kept.sort(descending=True).values.tolist() == slopes.sort(descending=True).values[: int(left)].tolist()


def test_noise_is_taken_away_again():
    """A peer's Bayesian SAM adds noise that it never removes."""
    model, _, _ = twins()
    opt = nusam.RWP(torch.optim.SGD(model.parameters(), lr=0.0), sigma=0.5)
    before = weights(model)
    passes = 0
    for _ in range(5):
        for name in opt.passes():
            passes += 1
            assert name == "descent"
            loss_of(model).backward()
            assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        opt.step()
    assert passes == 5
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", ["ASAM", "SSAM", "GSAM", "WSAM", "LookSAM", "m-RWP", "RWP"])
@pytest.mark.parametrize("scale", [2.0**16, 1e-3])
def test_a_loss_scale_changes_nothing(method, scale):
    hand, make = METHODS[method]
    model, expected, alone = twins()
    opt = make(BASES["sgd"](model.parameters()), delay=DELAY)
    for step in range(STEPS):
        for _ in opt.passes():
            (scale * loss_of(model, step)).backward()
        for p in model.parameters():
            p.grad /= scale
        opt.step()
    by_hand(expected, alone, hand(), STEPS)
    assert_same(model, expected)


@pytest.mark.parametrize("method", ["VaSSO", "FriendlySAM", "USAM"])
def test_a_scaler_is_refused_where_its_scale_would_count(method):
    model, _, _ = twins()
    opt = METHODS[method][1](BASES["sgd"](model.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    for _ in opt.passes():
        scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="which a GradScaler has scaled; use bfloat16"):
        scaler.step(opt)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", ["ASAM", "SSAM", "GSAM", "WSAM", "LookSAM", "m-RWP"])
def test_a_scaler_skips_a_step_that_is_not_finite(method):
    model, _, _ = twins()
    opt = METHODS[method][1](BASES["sgd"](model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0, 1.0, 1.0, 1.0]):
        before = weights(model)
        for _ in opt.passes():
            scaler.scale(loss_of(model, step) * factor).backward()
        scaler.step(opt)
        scaler.update()
        moved = not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert moved == (factor == 1.0)
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (nusam.ASAM, {"eta": -1.0}, "eta must be a finite number of at least 0, got -1.0."),
        (nusam.VaSSO, {"theta": 0.0}, r"theta must be a number in \(0, 1\], got 0.0."),
        (nusam.FriendlySAM, {"sigma": float("nan")}, "sigma must be a finite number of at least 0, got nan."),
        (nusam.FriendlySAM, {"lmbda": 1.0}, r"lmbda must be a number in \[0, 1\), got 1.0."),
        (nusam.SSAM, {"sparsity": 1}, r"sparsity must be a number in \[0, 1\), got 1."),
        (nusam.SSAM, {"refresh": 0}, "refresh must be a whole number of at least 1, got 0."),
        (nusam.RWP, {"mixture": 1.5}, r"mixture must be a number in \[0, 1\], got 1.5."),
        (nusam.GSAM, {"alpha": "much"}, "alpha must be a finite number of at least 0, got 'much'."),
        (nusam.WSAM, {"gamma": 1.0}, r"gamma must be a number in \[0, 1\), got 1.0."),
        (nusam.LookSAM, {"every": 2.5}, "every must be a whole number of at least 1, got 2.5."),
    ],
)
def test_what_is_refused(method, options, sentence):
    model = mlp()
    with pytest.raises(ValueError, match=sentence):
        method(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)


@pytest.mark.parametrize(
    ("method", "option"),
    [(nusam.SSAM, "refresh"), (nusam.LookSAM, "every"), (nusam.SAM, "delay"), (nusam.RWP, "seed"),
     (nusam.NuSAM, "power_iterations")],
)  # fmt: skip
def test_whole_numbers_of_numpy_are_whole_numbers(method, option):
    found = []
    for kind in (int, np.int64, np.uint8):
        torch.manual_seed(0)
        model = mlp(torch.float64)
        opt = method(torch.optim.SGD(model.parameters(), lr=0.1), **{option: kind(2)})
        for step in range(4):
            train_step(model, opt, step)
        found.append(weights(model))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    with pytest.raises(ValueError, match=f"{option} must be a whole number"):
        method(torch.optim.SGD(model.parameters(), lr=0.1), **{option: np.float64(2)})


@pytest.mark.parametrize("option", ["direction", "combination"])
def test_a_rank_one_ball_takes_neither(option):
    given = {"direction": nusam.directions.Averaged(0.5), "combination": nusam.combinations.Weighted(0.5)}[option]
    base = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"{option}= needs gradients that the ascent of Nuclear does not form; use a"):
        nusam.SharpnessAware(base, nusam.lmo.Nuclear(), **{option: given})


def test_perturbations_of_one_scale_leave_another_alone():
    """What ASAM is for: where neighbouring layers are scaled by c and 1/c, ε is the same in their own scales."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for c in (1.0, 8.0):
        with torch.no_grad():
            model[0].weight *= c
            model[2].weight /= c
        opt = nusam.ASAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1, eta=0.0)
        before = weights(model)
        for name in opt.passes():
            model(x).square().sum().backward()
            if name == "descent":
                found.append([p.detach() / old for p, old in zip(model.parameters(), before, strict=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Turns(nn.Module):
    """Two layers of which a step uses one; the other has no gradient then."""

    def __init__(self):
        super().__init__()
        self.pair, self.head = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]), nn.Linear(5, 3)

    def loss(self, step):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        return (self.head(self.pair[step % 2](x).tanh()) - 1).square().mean()


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if "RWP" not in name])
def test_a_gradient_that_is_not_there_counts_as_zeros(method, with_model):
    hand, make = METHODS[method]
    hand = hand()
    torch.manual_seed(0)
    model = Turns().double()
    expected = copy.deepcopy(model)
    opt = make(BASES["sgd"](model.parameters()), **({"model": model} if with_model else {}))
    alone = BASES["sgd"](expected.parameters())

    def gradients_with_zeros(step):
        alone.zero_grad()
        expected.loss(step).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in expected.parameters()]

    for step in range(10):
        for _ in opt.passes():
            model.loss(step).backward()
        opt.step()
        w, g = weights(expected), gradients_with_zeros(step)
        if hand.is_perturbed(step):
            with torch.no_grad():
                for p, e in zip(expected.parameters(), hand.epsilon(w, g, step), strict=True):
                    p += e
            g = hand.gradient(g, gradients_with_zeros(step))
            with torch.no_grad():
                for p, old in zip(expected.parameters(), w, strict=True):
                    p.copy_(old)
        else:
            g = hand.alone(g)
        for p, x in zip(expected.parameters(), g, strict=True):
            p.grad = None if p.grad is None else x
        alone.step()
        assert_same(model, expected)
