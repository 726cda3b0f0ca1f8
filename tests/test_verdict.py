"""find_rho's verdict, where the truth is known."""

import copy
import io
import math
import random
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.special import stdtrit
from scipy.stats import ttest_rel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nusam
from nusam.tools import trainings
from nusam.tools.trainings import Trained
from nusam.tools.verdict import Gain, Trial, gain_over

SAM_PRICE = 2.0  # passes of SAM's steps, each of which takes a second of the clock below


class Pair(nn.Module):
    """A model that remembers what it was trained with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.rho, self.passes = 0.0, 0


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as passes are made."""
    seconds = [0.0]
    monkeypatch.setattr(trainings, "perf_counter", lambda: seconds[0])
    return seconds


def peak(at, height, width=1.0):
    return lambda rho: height - width * math.log2(rho / at) ** 2 if rho else 0.0


def nothing(steps):
    return 0.0


def truth(gain, worth=nothing, noise=0.0, **options):
    """find_rho on a model whose score is ``gain(rho)``, what so many steps are worth, and noise.

    The trained weights take no part, and the noise is drawn anew in every training.
    """

    def loss(model, batch):
        model.passes += 1
        if "clock" in options:
            options["clock"][0] += 1.0
        return (model.weight * batch).sum()

    def score(model):
        return gain(model.rho) + worth(model.passes / (SAM_PRICE if model.rho else 1)) + noise * draw.gauss(0, 1)

    def known(base, rho, delay, model, **rest):
        model.rho = rho
        return nusam.SAM(base, rho=rho, delay=delay, model=model, **rest)

    draw = random.Random(options.pop("seed", 0))
    batches = DataLoader(torch.rand(6, 2, 2), 2, shuffle=True)
    given = {"methods": (known,), "steps": 4, "delay": 0, "seeds": 2, **options}
    given.pop("clock", None)
    return nusam.find_rho(Pair(), sgd, loss, batches, batches, score=score, **given)


@pytest.mark.parametrize("freedom", [*range(1, 31), 99])
def test_the_interval_is_students(freedom):
    scores = [random.Random(i).gauss(0, 1) for i in range(freedom + 1)]
    other = [random.Random(-i - 1).gauss(0, 1) for i in range(freedom + 1)]
    gain = gain_over(Trial("A", 0.1, tuple(scores)), Trial("base optimizer", 0.0, tuple(other)))
    interval = ttest_rel(scores, other).confidence_interval(0.95)
    assert gain.mean - gain.half_width == pytest.approx(interval.low, rel=1e-9)
    assert gain.mean + gain.half_width == pytest.approx(interval.high, rel=1e-9)
    assert stdtrit(freedom, 0.975) > 1.95


@pytest.mark.parametrize("at", [0.001, 0.005, 0.03, 0.1, 0.3, 0.77, 3.0, 11.0])
@pytest.mark.parametrize("height", [2.0, -0.5])
def test_the_search_goes_on_until_the_best_has_worse_neighbours(at, height):
    found = truth(peak(at, height))
    rhos = [trial.rho for trial in found.trials]
    assert rhos == sorted(rhos)
    assert all(b / a == pytest.approx(2) for a, b in pairwise(rhos))
    best = found.suggestion("known")
    assert 1 / math.sqrt(2) <= best.rho / at <= math.sqrt(2)
    assert found.bracketed(best)


@pytest.mark.parametrize("at", [1e-7, 1e4])
def test_a_search_that_never_turns_stops_and_says_so(at):
    found = truth(peak(at, 1e6), confirm=2)
    assert len(found.trials) == 12
    assert not found.bracketed(found.suggestion("known"))
    assert not found.verdict.bracketed
    beyond = 0.0125 / 128 if at < 1 else 0.4 * 128
    assert f"not bracketed, try ρ = {beyond:g} too" in str(found.verdict)


def test_named_radii_are_the_only_ones_and_a_best_at_their_end_is_said_to_be():
    for at, beyond in ((0.4, 0.4), (0.05, 0.05), (0.1, None)):
        found = truth(peak(at, 2.0), noise=0.01, rhos=(0.1, 0.2) if at != 0.1 else (0.05, 0.1, 0.2), confirm=3)
        assert len(found.trials) == (3 if at == 0.1 else 2)
        assert found.verdict.helps
        assert found.verdict.beyond == beyond
        assert ("not bracketed" in str(found.verdict)) == (beyond is not None)


def test_a_plateau_is_bracketed_by_what_is_worse_on_both_sides():
    found = truth(lambda rho: float(0.03 < rho < 0.3), rhos=(0.025, 0.05, 0.1, 0.2, 0.4))
    assert found.suggestions == {"known": 0.05}
    assert found.bracketed(found.suggestion("known"))


def test_larger_radii_that_diverge_are_worse():
    found = truth(lambda rho: -1.0 if not rho else 0.0 if rho < 0.004 else math.nan)
    assert found.suggestion("known").score == 0.0
    assert found.suggestions["known"] < 0.004


def test_a_method_that_helps_is_taken(clock):
    found = truth(peak(0.1, 3.0), noise=0.3, confirm=8, clock=clock)
    verdict = found.verdict
    assert verdict.helps
    assert verdict.bracketed
    assert verdict.trial.rho == pytest.approx(0.1, rel=0.5)
    assert abs(verdict.gain.mean - 3.0) < 1.0
    assert verdict.price == SAM_PRICE
    assert str(verdict) == f"known, ρ = {verdict.trial.rho:g}: {verdict.gain} for 100% more time."


def test_the_base_optimizer_gets_the_seconds_that_the_method_takes(clock):
    """What twice the steps are worth is no gain of a method that costs twice as much."""

    def worth(taken):
        return 2.0 * math.log2(taken / 4)

    found = truth(peak(0.1, 1.5), worth, noise=0.05, confirm=6, clock=clock)
    assert found.suggestions["known"] == 0.1  # in as many steps it is better
    assert found.base.steps == found.trials[0].steps == 4
    assert found.at_equal_seconds["known", 1.0].steps == found.verdict.base.steps == 8
    assert sum(found.verdict.base.seconds) == sum(found.verdict.trial.seconds)
    assert found.gain(found.suggestion("known")).mean == pytest.approx(-0.5, abs=0.3)
    assert not found.verdict.helps
    assert str(found.verdict).startswith("A loss; leave it off (known, ρ = ")
    assert truth(peak(0.1, 2.5), worth, noise=0.05, confirm=6, clock=clock).verdict.helps


def test_the_winner_is_confirmed_on_seeds_that_did_not_pick_it():
    seen = []

    def method(base, rho, delay, model):
        seen.append(torch.initial_seed())
        return nusam.SAM(base, rho=rho, delay=delay, model=model)

    told = []
    batches = DataLoader(torch.rand(6, 2, 2), 2, shuffle=True)
    seeds = []

    def loss(model, batch):
        seeds.append(torch.initial_seed())
        return (model.weight * batch).square().sum()

    found = nusam.find_rho(
        Pair(), sgd, loss, batches, batches, methods=(method,), rhos=(0.1, 0.2), steps=2, seeds=3, confirm=4,
        report=told.append,
    )  # fmt: skip
    assert set(seeds) == set(range(7))
    assert [len(trial.scores) for trial in told] == [3, 3, 3, 3, 4, 4]
    assert told[-2:] == [found.verdict.trial, found.verdict.base]
    assert found.verdict.tried == 2


def test_chance_is_rarely_taken_for_a_gain(monkeypatch):
    """One in forty by the interval; the best of six, on the seeds that picked it, gains nearly always."""
    made = Trained(Pair(), sgd(Pair()), 1.0)
    monkeypatch.setattr(trainings.Trainings, "run", lambda *_: made)
    picked = confirmed = 0
    for seed in range(200):
        found = truth(lambda rho: 0.0, noise=1.0, seed=seed, rhos=(1, 2, 3, 4, 5, 6), seeds=3, confirm=3)
        picked += max(found.gain(trial).mean for trial in found.trials) > 0
        confirmed += found.verdict.helps
    assert picked > 160
    assert confirmed <= 12


def test_no_effect_leaves_it_off():
    verdict = truth(lambda rho: 0.0, noise=1.0, confirm=4).verdict
    assert not verdict.helps
    assert str(verdict).startswith("No gain seen; leave it off (known, ρ = ")


def test_several_methods_and_shares_are_told_apart(clock):
    def cheap(base, rho, delay, model, ascent_share=1.0):
        model.rho = rho if ascent_share < 1 else rho * 1e-9
        return nusam.SAM(base, rho=rho, delay=delay, model=model, ascent_share=ascent_share)

    found = truth(
        peak(0.1, 3.0), noise=0.1, methods=(cheap, nusam.NuSAM), ascent_share=(1, 0.125), confirm=4,
        clock=clock, rhos=(0.05, 0.1, 0.2),
    )  # fmt: skip
    assert [(t.method, t.ascent_share) for t in found.trials[::3]] == [
        ("cheap", 1), ("cheap", 0.125), ("NuSAM", 1), ("NuSAM", 0.125),
    ]  # fmt: skip
    assert found.verdict.trial.label == "cheap at 1/8, ρ = 0.1"
    assert found.suggestions["cheap"] == 0.1
    assert found.suggestion("cheap").ascent_share == 0.125
    assert len(found.at_equal_seconds) == 4


@pytest.mark.parametrize("diverges", ["base", "method", "both"])
def test_what_diverges_is_said_to(diverges):
    def gain(rho):
        return math.nan if diverges in ("both", "method" if rho else "base") else 0.0

    verdict = truth(gain, noise=0.1, rhos=(0.1, 0.2), confirm=3).verdict
    assert not verdict.helps
    if diverges == "method":
        assert "ended in no finite score on 3 new seeds" in str(verdict)
    else:
        assert str(verdict).startswith("The base optimizer alone ends in no finite score")


def test_seeds_that_change_nothing_give_no_verdict():
    model = nn.Linear(3, 2)
    batches = list(torch.randn(12, 3).split(4))
    found = nusam.find_rho(
        model, sgd, lambda model, x: model(x).square().mean(), batches, batches, rhos=(0.05, 0.1), steps=4, confirm=3
    )
    assert math.isinf(found.verdict.gain.half_width)
    assert not found.verdict.helps
    assert str(found.verdict).startswith("No verdict: every seed trained alike")


def labelled(count=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("helps", [True, False])
@pytest.mark.parametrize("one_pass", [False, True])
def test_going_on_is_what_the_training_would_have_done(helps, one_pass, clock):
    """Weights, optimizer and ε of the best seed, at the learning rate that the base came with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(labelled(), 8, shuffle=True)
    judged = []

    def score(trained):
        judged.append(copy.deepcopy(trained))
        better = (7, 8, 9) if helps else (10, 11, 12)
        return float(judged[-1][0].weight.sum()) % 1 + 10.0 * (len(judged) in better)

    found = nusam.find_rho(
        model, adamw, cross_entropy, loader, loader, methods=(nusam.NuSAM,), rhos=(0.05, 0.1), steps=10, seeds=2,
        confirm=3, score=score, one_pass=one_pass, ascent_share=0.5,
    )  # fmt: skip
    assert found.verdict.helps == helps
    taken = found.verdict.trial if helps else found.verdict.base
    best = max(range(3), key=lambda seed: taken.scores[seed])
    trained = judged[-6 + best] if helps else judged[-3 + best]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    opt = found.verdict.go_on(model, adamw)
    assert isinstance(opt, nusam.NuSAM) == helps
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    assert [group["lr"] for group in opt.param_groups] == [1e-2]
    steps = {int(state["step"]) for state in opt.state_dict()["state"].values()}
    assert steps == {taken.steps}
    if helps:
        assert opt.active
        assert opt.ascent_share == 0.5
        assert opt.param_groups[0]["rho"] == taken.rho
    x, y = next(iter(loader))
    for part in opt.passes(x, y) if helps else ((x, y),):
        cross_entropy(model, part).backward()
    opt.step()

    file = io.BytesIO()
    torch.save({"model": found.verdict.weights, "optimizer": found.verdict.optimizer_state}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    model.load_state_dict(again["model"])
    opt.load_state_dict(again["optimizer"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((None, sgd), "model must be a torch.nn.Module"),
        ((Pair(), sgd(Pair())), "base must be a function, .* got a SGD"),
    ],
)
def test_going_on_needs_a_model_and_a_function(given, sentence):
    verdict = truth(peak(0.1, 1.0), rhos=(0.1,), confirm=2).verdict
    with pytest.raises(TypeError, match=sentence):
        verdict.go_on(*given)


@pytest.mark.parametrize(
    "noisy",
    [nusam.RWP, partial(nusam.RWP, mixture=0.5), lambda base, sigma, **options: nusam.RWP(base, sigma, **options)],
)
def test_a_method_whose_radius_is_called_sigma_gets_it(noisy):
    batches = DataLoader(labelled(), 8, shuffle=True)
    model = nn.Linear(5, 3)
    given = (model, adamw, cross_entropy, batches, batches)
    found = nusam.find_rho(*given, methods=(noisy,), rhos=(0.01, 0.3), steps=6, seeds=1, delay=0)
    assert len({trial.scores for trial in found.trials}) == 2
    small = nusam.find_rho(*given, methods=(noisy,), rhos=(1e-9,), steps=6, seeds=1, delay=0)
    assert small.trials[0].score == pytest.approx(small.base.score, rel=1e-5)
    friendly = nusam.find_rho(*given, methods=(nusam.FriendlySAM,), rhos=(0.1,), steps=1, seeds=1)
    assert friendly.trials[0].rho == 0.1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"confirm": 1}, "confirm must be 0 or at least 2, got 1"),
        ({"confirm": -1}, "confirm must be a whole number"),
        ({"ascent_share": ()}, "ascent_share must be a number or several different ones"),
        ({"ascent_share": (0.5, 0.5)}, "ascent_share must be a number or several different ones"),
        ({"ascent_share": (0.5, 2.0)}, "ascent_share"),
    ],
)
def test_what_it_refuses(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        truth(peak(0.1, 1.0), **change)


def test_no_method_may_be_called_as_the_base_optimizer_is():
    alone = partial(nusam.SAM)
    alone.__name__ = "base optimizer"
    with pytest.raises(ValueError, match="Two methods are called base optimizer"):
        truth(peak(0.1, 1.0), methods=(alone,))


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (Gain(1.9312, 0.6137), "+1.93 ± 0.61"),
        (Gain(-12.284, 1.03861), "−12.3 ± 1.0"),
        (Gain(0.00123, 0.00045), "+0.00123 ± 0.00045"),
        (Gain(1234.5, 321.0), "+1234 ± 321"),
        (Gain(1.0, 0.0), "+1.00 ± 0.00"),
        (Gain(0.5, math.inf), "+0.5"),
    ],
)
def test_a_gain_is_rounded_to_its_error(gain, text):
    assert str(gain) == text


@pytest.mark.parametrize("harm", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("share", [1, 0.5])
def test_a_method_that_does_nothing_has_no_gain_whatever_more_steps_do(harm, share, clock):
    """Twice the steps are worse where training overfits: the method must also beat the base in as many steps."""

    def worth(taken):
        return -harm * math.log2(taken / 4)

    def idle(base, rho, delay, model, **rest):
        model.rho = rho
        return nusam.SAM(base, rho=rho, delay=delay, model=model)

    found = truth(
        lambda rho: 0.0, worth, methods=(idle,), rhos=(1e-7, 1e-6), noise=1e-6, ascent_share=share, confirm=6,
        clock=clock,
    )  # fmt: skip
    assert found.at_equal_seconds["idle", share].steps == 8
    assert found.verdict.base.steps == (8 if harm < 0 else 4) or harm == 0
    assert found.verdict.gain.mean == pytest.approx(min(0.0, harm), abs=1e-4)
    assert found.gain(found.trials[0]).mean == pytest.approx(min(0.0, harm), abs=1e-4)
    assert ("in as many steps, which did no better in as many seconds, for 100%" in str(found.verdict)) == (
        found.verdict.base.steps == 4
    )
    assert truth(peak(1.0, 0.5), worth, noise=1e-3, rhos=(1.0,), confirm=4, clock=clock).verdict.helps == (harm >= 0)


def test_weights_that_overfit_are_not_kept(clock):
    """Those to go on from are of the base optimizer that the method was compared with."""
    found = truth(lambda rho: -float(rho), lambda taken: -taken, rhos=(1.0,), confirm=2, clock=clock)
    assert not found.verdict.helps
    moved = (1 - found.verdict.weights["weight"]).sum()
    longer = truth(lambda rho: -float(rho), lambda taken: taken, rhos=(1.0,), confirm=2, clock=clock)
    assert 0 < moved < 0.75 * (1 - longer.verdict.weights["weight"]).sum()


INF = math.inf


@pytest.mark.parametrize(
    ("scores", "base", "mean"),
    [
        ((1.0, -INF), (-INF, 1.0), -INF),
        ((-INF, 1.0, 2.0), (1.0, -INF, 2.0), -INF),
        ((-INF, -INF), (-INF, 1.0), -INF),
        ((-INF, 2.0), (-INF, 1.0), 0.5),
        ((1.0, 2.0), (-INF, 1.0), INF),
    ],
)
def test_a_gain_of_what_diverged_is_no_error(scores, base, mean):
    gain = gain_over(Trial("A", 0.1, scores), Trial("base optimizer", 0.0, base))
    assert gain.mean == mean
    assert not gain.helps
    assert str(gain)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_on_a_batch_is_no_error(bad):
    """Nor where those of two batches have no mean."""
    batches = [torch.rand(2, 2), torch.rand(2, 2)]

    def loss(model, batch):
        kind = bad if batch is batches[0] else -bad
        return (model.weight * batch).sum() * (1.0 if model.training else kind)

    found = nusam.find_rho(Pair(), sgd, loss, batches, batches, methods=(nusam.SAM,), rhos=(0.1,), steps=2, confirm=2)
    assert set(found.base.scores) == {-math.inf}
    assert str(found.verdict).startswith("The base optimizer alone ends in no finite score")


@pytest.mark.parametrize("bad", [{1, 4}, {2, 3}, {5, 8}, {7, 10}, {8, 9, 11}, {1, 4, 5, 8}])
def test_a_search_in_which_each_diverges_on_another_seed_ends_in_a_verdict(bad):
    """Judged are, on two seeds each: the base, the method, the base for longer; and method and base on new seeds."""
    judged = []

    def score(model):
        judged.append(model)
        return math.nan if len(judged) in bad else float(len(judged))

    batches = DataLoader(torch.rand(6, 2, 2), 2, shuffle=True)
    found = nusam.find_rho(
        Pair(), sgd, lambda model, batch: (model.weight * batch).sum(), batches, batches, methods=(nusam.SAM,),
        rhos=(0.1,), steps=2, confirm=2, score=score,
    )  # fmt: skip
    assert str(found.verdict)
    assert not found.verdict.helps
    assert str(found.gain(found.trials[0]))
