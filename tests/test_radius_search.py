"""find_rho against trainings by hand."""

import copy
import math
import random
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import nusam
from nusam.tools.radius_search import RadiusSearch, Trial

STEPS = 12


def base(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def setup():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))
    x = torch.randn(60, 5)
    y = x[:, :3].argmax(1)
    train, held_out = TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:])
    return {
        "model": model,
        "base": base,
        "loss": loss,
        "loader": DataLoader(train, 8, shuffle=True),
        "validation": DataLoader(held_out, 10),
    }


def by_hand(setup, method, rho, seed):
    """Warm-up of a quarter and a cosine, ε after a quarter, epochs of five batches."""
    torch.manual_seed(seed)
    model = copy.deepcopy(setup["model"])
    inner = base(model)
    opt = inner if method is None else method(inner, rho=rho, delay=3, model=model)
    taken = 0
    while taken < STEPS:
        for batch in setup["loader"]:
            if taken == STEPS:
                break
            cosine = (1 + math.cos(math.pi * (taken - 3) / 9)) / 2
            inner.param_groups[0]["lr"] = 0.2 * ((taken + 1) / 4 if taken < 3 else cosine)

            def closure(batch=batch):
                opt.zero_grad()
                value = loss(model, batch)
                value.backward()
                return value

            opt.step(closure)
            taken += 1
    model.eval()
    with torch.no_grad():
        return -sum(float(loss(model, batch)) for batch in setup["validation"]) / 2


def test_every_trial_is_the_training_by_hand(setup):
    found = nusam.find_rho(**setup, rhos=(0.3, 0.1), steps=STEPS, delay=0.25, warm_up=0.25, seeds=2)
    assert [(trial.method, trial.rho) for trial in found.trials] == [
        ("NuSAM", 0.1),
        ("NuSAM", 0.3),
        ("SAM", 0.1),
        ("SAM", 0.3),
    ]
    for trial in (found.base, *found.trials):
        method = {"NuSAM": nusam.NuSAM, "SAM": nusam.SAM}.get(trial.method)
        expected = [by_hand(setup, method, trial.rho, seed) for seed in range(2)]
        assert trial.scores == pytest.approx(expected, rel=1e-5), trial
        assert trial.score == pytest.approx(sum(expected) / 2)


def test_in_one_pass_a_trial_is_that_training_by_hand(setup):
    setup["model"] = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))
    options = {"methods": (nusam.NuSAM,), "rhos": (0.3,), "steps": STEPS, "delay": 0.25, "warm_up": 0.25, "seeds": 1}
    found = nusam.find_rho(**setup, **options, ascent_share=0.5, one_pass=True)
    torch.manual_seed(0)
    model = copy.deepcopy(setup["model"])
    inner = base(model)
    opt = nusam.NuSAM(inner, rho=0.3, delay=3, model=model, ascent_share=0.5)
    batches = [*setup["loader"], *setup["loader"], *setup["loader"]][:STEPS]
    steps = opt.one_pass(batches, partial(loss, model))
    for taken in range(STEPS):
        cosine = (1 + math.cos(math.pi * (taken - 3) / 9)) / 2
        inner.param_groups[0]["lr"] = 0.2 * ((taken + 1) / 4 if taken < 3 else cosine)
        next(steps)
        opt.step()
    with torch.no_grad():
        expected = -sum(float(loss(model, batch)) for batch in setup["validation"]) / 2
    assert found.trials[0].scores == pytest.approx([expected], rel=1e-5)
    two = nusam.find_rho(**setup, **options, ascent_share=0.5)
    assert abs(two.trials[0].score - found.trials[0].score) > 1e-6
    assert two.base == found.base


def test_nothing_of_the_user_is_touched(setup):
    model = setup["model"]
    before, mode = copy.deepcopy(model.state_dict()), model.training
    state = torch.get_rng_state()
    nusam.find_rho(**setup, rhos=(0.1,), methods=(nusam.NuSAM,), steps=3, seeds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_mean_is_suggested_and_the_smallest_of_equals():
    trials = (Trial("A", 0.1, (1.0, 3.0)), Trial("A", 0.2, (2.0, 2.0)), Trial("A", 0.3, (5.0, -4.0)))
    worse = (Trial("B", 0.1, (-1.0, 0.5)), Trial("B", 0.2, (-math.inf, 9.0)))
    found = RadiusSearch(Trial("base optimizer", 0.0, (1.0, 0.0)), trials + worse)
    assert found.suggestion("A").rho == 0.1
    assert found.suggestions == {"A": 0.1, "B": 0.0}


def test_a_training_that_collapses_is_never_suggested(setup):
    def collapsing(model, batch):
        value = loss(model, batch)
        return value * (float("nan") if model[0].weight.norm() > 50 else 1)

    found = nusam.find_rho(
        **{**setup, "loss": collapsing}, rhos=(0.1, 1e4), methods=(nusam.SAM,), steps=STEPS, seeds=1, delay=0
    )
    assert found.trials[1].scores == (-math.inf,)
    assert found.suggestion("SAM").rho == 0.1


def test_a_score_of_ones_own_and_a_report(setup):
    seen = []
    found = nusam.find_rho(
        **setup,
        rhos=(0.1,),
        methods=(nusam.SAMON,),
        steps=2,
        seeds=1,
        score=lambda model: float(not model.training and not torch.is_grad_enabled()),
        report=seen.append,
    )
    assert found.base.scores == (1.0,)
    assert seen == [found.base, *found.trials]


def test_a_part_in_evaluation_mode_stays_there(setup):
    modes = []

    def watched(model, batch):
        modes.append([module.training for module in model])
        return loss(model, batch)

    model = setup["model"]
    for frozen, expected in ((False, [True] * 5), (True, [True, False, True, True, True])):
        modes.clear()
        model.train()
        model[1].train(not frozen)
        nusam.find_rho(**{**setup, "loss": watched}, rhos=(0.1,), methods=(nusam.NuSAM,), steps=1, seeds=1)
        assert [mode for mode in modes if any(mode)] == [expected] * 3
    model.eval()  # as a pretrained model comes
    modes.clear()
    nusam.find_rho(**{**setup, "loss": watched}, rhos=(0.1,), methods=(nusam.NuSAM,), steps=1, seeds=1)
    assert [True] * 5 in modes


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loader": iter([1])}, "loader must give the same batches to every training, got a list_iterator"),
        ({"validation": (batch for batch in ())}, "validation must give the same batches.*got a generator"),
        ({"base": lambda model: None}, "base_optimizer must be a torch.optim.Optimizer, got NoneType"),
        ({"base": lambda model: torch.optim.LBFGS(model.parameters())}, "LBFGS evaluates its closure several times"),
        ({"base": lambda model: torch.optim.Adadelta(model.parameters())}, "Adadelta has a hyperparameter rho"),
        ({"base": lambda model: nusam.SAM(sgd(model))}, "base_optimizer is a SAM, itself a wrapper"),
        ({"base": torch.optim.SGD}, "base must be a function, .*, got <class"),
        ({"loss": 0.5}, "loss must be a function, .*, got 0.5"),
        ({"methods": nusam.NuSAM}, "methods must be something to iterate over, got <class"),
        ({"loader": None}, "loader must be something to iterate over, got None"),
        (
            {"loss": lambda model, batch: 0.5},
            "loss that find_rho.. is given must return a tensor with one value, got a",
        ),
        ({"loss": lambda model, batch: model(batch[0])}, "with one value, got a tensor of shape"),
        ({"score": lambda model: "x"}, "score must return a number, got 'x'"),
        ({"model": None}, "model must be a torch.nn.Module, got NoneType"),
        ({"model": nn.Linear}, "model must be a torch.nn.Module, got the class Linear"),
        ({"base": lambda model: nusam.NuSAM(sgd(model))}, "base must return the optimizer alone, .* is a NuSAM"),
        ({"base": sgd(nn.Linear(2, 2))}, "base must be a function, .*, got a SGD.$"),
        ({"base": lambda: None}, "base must be a function of a model, got one that takes others"),
        ({"loss": nn.CrossEntropyLoss()}, "loss must be a function of a model and a batch, got a CrossEntropyLoss"),
        ({"loss": lambda model: 0}, "loss must be a function of a model and a batch, got one that takes others"),
        ({"score": lambda model, batch: 0}, "score must be a function of a model, got one that takes others"),
        ({"report": 1}, "report must be a function, .*, got 1.$"),
        ({"methods": "NuSAM"}, "methods must be a list or the like, got 'NuSAM'"),
        ({"methods": ["NuSAM", "SAM"]}, "methods must be a method such as nusam.NuSAM, .* got 'NuSAM'"),
        ({"methods": [torch.optim.SGD]}, "methods must be a method such as nusam.NuSAM, .* got <class"),
        ({"methods": [nusam.SAM(sgd(nn.Linear(2, 2)))]}, "methods must be a method such as nusam.NuSAM, .* got a SAM"),
        ({"methods": [nusam.SharpnessAware]}, "methods must take .* got one that does not: missing .* 'lmo'"),
        ({"methods": [lambda base, rho, model: 0]}, "methods must take .* got one that does not: .* 'delay'"),
        ({"methods": [lambda base, **options: base]}, "A method must make a nusam.SharpnessAware, got a SGD"),
        ({"loader": {"x": torch.ones(2)}}, "loader must be a list or the like, got a dict"),
        ({"validation": "held out"}, "validation must be a list or the like, got 'held out'"),
    ],
)
def test_what_can_not_serve_several_trainings_is_refused_before_the_first(setup, change, sentence):
    seen = []
    with pytest.raises(TypeError, match=sentence):
        nusam.find_rho(**{**setup, "report": seen.append, **change}, steps=2)
    assert seen == []


def with_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)))


def with_a_kept_activation():
    model = nn.Linear(5, 3)
    model.seen = model(torch.ones(5))
    return model


def with_a_lock():
    model = nn.Linear(5, 3)
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize("make", [with_old_weight_norm, with_a_kept_activation, with_a_lock])
def test_a_model_that_can_not_be_copied_is_refused_in_one_sentence(setup, make):
    with pytest.raises(TypeError, match=r"trains copies of the model, and a .* could not be deep-copied \(") as raised:
        nusam.find_rho(**{**setup, "model": make()}, steps=2)
    assert "\n" not in str(raised.value)
    assert ". " not in str(raised.value)


@pytest.mark.parametrize("which", ["loader", "validation"])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_batch_is_not_taken_for_batches(setup, which, as_list):
    batch = next(iter(setup["validation"]))
    given = {**setup, which: list(batch) if as_list else tuple(batch)}
    seen = []
    with pytest.raises(TypeError, match=r"loader and validation must both give batches, .* \[batch\]\.$"):
        nusam.find_rho(**given, steps=2, report=seen.append)
    assert seen == []
    found = nusam.find_rho(**{**setup, which: [batch]}, methods=(nusam.SAM,), rhos=0.1, steps=1, seeds=1)
    assert len(found.trials) == 1


@pytest.mark.parametrize("rhos", [(0.1, 0.1), (0.2, 0.1, 0.2), np.array([0.1, 0.1, 0.1])])
def test_a_radius_that_is_named_twice_is_tried_once(setup, rhos):
    told = []
    found = nusam.find_rho(**setup, methods=(nusam.SAM,), rhos=rhos, steps=1, seeds=1, report=told.append)
    assert [trial.rho for trial in found.trials] == sorted(set(map(float, rhos)))
    assert len(told) == 1 + len(found.trials)


def test_what_only_the_score_reads_may_be_of_another_kind(setup):
    given = {**setup, "validation": torch.ones(3, 2), "score": lambda model: 0.0}
    found = nusam.find_rho(**given, methods=(nusam.SAM,), rhos=0.1, steps=1, seeds=1)
    assert found.base.scores == (0.0,)


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("one_pass", [False, True])
def test_an_autocast_around_the_search_is_one_inside_the_loss(setup, share, one_pass):
    """With the cast weights of an earlier step the base optimizer, or the method, would not learn."""
    setup["model"] = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))

    def inside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    with torch.no_grad():
        untrained = -sum(float(inside(setup["model"], batch)) for batch in setup["validation"]) / 2
    options = {"rhos": (0.1,), "steps": STEPS, "seeds": 1, "ascent_share": share, "methods": (nusam.NuSAM,)}
    expected = nusam.find_rho(**{**setup, "loss": inside}, **options, one_pass=one_pass)
    assert abs(expected.base.score - untrained) > 0.01
    with torch.autocast("cpu", torch.bfloat16):
        found = nusam.find_rho(**setup, **options, one_pass=one_pass)
    for trial, other in zip((found.base, *found.trials), (expected.base, *expected.trials), strict=True):
        assert trial.scores == pytest.approx(other.scores, rel=1e-3)


def test_no_grad_around_the_search_is_not_in_its_way(setup):
    options = {"methods": (nusam.NuSAM,), "rhos": (0.1,), "steps": 3, "seeds": 1}
    with torch.no_grad():
        found = nusam.find_rho(**setup, **options)
    assert found == nusam.find_rho(**setup, **options)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"find_rho\(\) needs gradients"):
        nusam.find_rho(**setup, **options)


def test_methods_may_come_one_by_one(setup):
    found = nusam.find_rho(**setup, methods=iter([nusam.NuSAM, nusam.SAM]), rhos=(0.1,), steps=1, seeds=1)
    assert [trial.method for trial in found.trials] == ["NuSAM", "SAM"]
    with pytest.raises(ValueError, match=r"no trial of 'nusam'; name one that was tried: NuSAM, SAM\.$"):
        found.suggestion("nusam")


@pytest.mark.parametrize("captured", ["base", "loss", "both"])
def test_functions_of_the_model_outside_are_refused_and_leave_it_alone(setup, captured):
    """They would train that one, or nothing, and judge copies that never change."""
    model = setup["model"]
    before = copy.deepcopy(model.state_dict())
    changes = {"base": lambda _: sgd(model), "loss": lambda _, batch: loss(model, batch)}
    given = {name: change for name, change in changes.items() if captured in (name, "both")}
    with pytest.raises(ValueError, match=f"{'loss' if captured == 'loss' else 'base'} must .* which is a copy"):
        nusam.find_rho(**{**setup, **given}, rhos=0.1, steps=3)
    weights = [name for name in before if "running" not in name and "tracked" not in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in weights)


def test_a_loss_of_no_parameter_is_refused(setup):
    with pytest.raises(
        ValueError, match=r"loss must compute with the model that it is given.* depends on no parameter"
    ):
        nusam.find_rho(**{**setup, "loss": lambda model, batch: loss(model, batch).detach()}, rhos=0.1, steps=3)


def test_a_method_that_can_not_wrap_the_base_is_refused_before_the_first_training(setup):
    seen = []
    methods = (nusam.NuSAM, partial(nusam.NuSAM, ascent="sideways"))
    methods[1].__name__ = "sideways"
    with pytest.raises(ValueError, match="ascent must be one of"):
        nusam.find_rho(**setup, methods=methods, steps=2, report=seen.append)
    assert seen == []


def test_two_methods_of_one_name_are_refused(setup):
    with pytest.raises(ValueError, match=r"Two methods are called NuSAM; give one of them a __name__ of its own\.$"):
        nusam.find_rho(**setup, methods=(nusam.NuSAM, partial(nusam.NuSAM, power_iterations=2)), steps=2)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_radii_may_be_an_array(setup, kind):
    one = nusam.find_rho(**setup, methods=(nusam.SAM,), rhos=kind(0.25), ascent_share=kind(0.5), steps=1, seeds=1)
    assert [(trial.rho, trial.ascent_share) for trial in one.trials] == [(0.25, 0.5)]
    radii = kind([0.2, 0.1], dtype=np.float64 if kind is np.array else torch.float64)
    found = nusam.find_rho(**setup, methods=(partial(nusam.NuSAM, seed=3),), rhos=radii, steps=1, seeds=1)
    assert [(trial.method, trial.rho) for trial in found.trials] == [("NuSAM", 0.1), ("NuSAM", 0.2)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rhos": ()}, "at least one method and one rho"),
        ({"methods": ()}, "at least one method and one rho"),
        ({"rhos": (0.1, 0.0)}, "rhos must be positive, got 0"),
        ({"rhos": (float("nan"),)}, "finite number"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"delay": 1.0}, "delay must be a share of the steps"),
        ({"delay": "a"}, "delay must be a share of the steps.* got 'a'"),
        ({"delay": None}, "delay must be a share of the steps.* got None"),
        ({"warm_up": True}, "warm_up must be a share of the steps"),
        ({"model": nn.ReLU()}, "model ReLU has no parameter"),
        ({"model": nn.Linear(5, 3, device="meta")}, "a model with weights"),
        ({"one_pass": True}, r"got SAM; name others, such as methods=\(nusam.NuSAM,\)\.$"),
        ({"warm_up": -0.1}, "warm_up must be a share of the steps"),
        ({"loader": []}, "The loader gave no batch"),
        ({"one_pass": True}, "rank-one"),
        ({"validation": []}, "validation gave no batch"),
    ],
)
def test_what_it_refuses(setup, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        nusam.find_rho(**{**setup, "steps": 2, **change})


def test_a_partial_with_a_name_is_a_method(setup):
    twice = partial(nusam.NuSAM, power_iterations=2)
    twice.__name__ = "NuSAM, two iterations"
    found = nusam.find_rho(**setup, methods=(twice,), rhos=(0.1,), steps=2, seeds=1)
    assert found.trials[0].method == "NuSAM, two iterations"


class Augmented(torch.utils.data.Dataset):
    """Adds what ``draw`` gives to every sample."""

    def __init__(self, data, draw, holds=None):
        self.data, self.draw, self.holds = data, draw, holds

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + float(self.draw()), y


class Wrapped:
    """A loader of one's own around another."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)


def of_a_loader(data):
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))


def of_a_sampler(data):
    sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return DataLoader(data, 8, sampler=sampler)


def of_a_batch_sampler(data):
    sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return Wrapped(DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 8, drop_last=False)))


def of_python(data):
    return DataLoader(Augmented(data, random.random), 8)


def of_numpy(data):
    return DataLoader(Augmented(data, np.random.rand), 8)


def of_a_data_set(make, reached):
    def loader(data):
        own = make(3)
        draw = own.normal if hasattr(own, "normal") else own.random
        return DataLoader(Augmented(data, *(reached(draw, own))), 8)

    return loader


def in_a_list(draw, own):
    return lambda: own.normal() if hasattr(own, "normal") else own.random(), {"transforms": [own]}


def in_a_closure(draw, own):
    return lambda: draw() / 2, None


def in_a_partial(draw, own):
    return partial(lambda given: given(), draw), None


LOADERS = [
    of_a_loader,
    of_a_sampler,
    of_a_batch_sampler,
    of_python,
    of_numpy,
    *(
        of_a_data_set(make, reached)
        for make in (np.random.default_rng, np.random.RandomState, random.Random)
        for reached in (in_a_list, in_a_closure, in_a_partial)
    ),
]


@pytest.mark.parametrize("make", LOADERS)
def test_every_training_of_a_seed_sees_the_same_batches(setup, make):
    """Whatever draws them; trainings of another seed see others, and what comes after the search is as without it."""
    seen = []

    def watched(model, batch):
        if model.training:
            seen.append(batch[0].clone())
        return loss(model, batch)

    loader = make(setup["loader"].dataset)

    def begin():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    begin()
    options = {"methods": (nusam.RWP,), "rhos": (0.1,), "steps": 7, "seeds": 2, "delay": 0.99}
    expected = [x for x, _ in make(setup["loader"].dataset)]
    begin()
    nusam.find_rho(**{**setup, "loader": loader, "loss": watched, "score": lambda model: 0.0}, **options)
    trainings = [torch.cat(seen[i : i + 7]) for i in range(0, 28, 7)]  # two seeds alone, two with the method
    assert len(seen) == 28
    assert torch.equal(trainings[0], trainings[2])
    assert torch.equal(trainings[1], trainings[3])
    assert not torch.equal(trainings[0], trainings[1])
    assert all(map(torch.equal, expected, [x for x, _ in loader]))


class Averaged(torch.optim.SGD):
    """Takes its steps in training mode, and shows its average in evaluation mode, as schedule-free optimizers do."""

    training = False

    def train(self):
        self._turn(True)

    def eval(self):
        self._turn(False)

    def _turn(self, training):
        if self.training != training:
            self.training = training
            for weight in self.param_groups[0]["params"]:
                weight.data.mul_(0.5 if training else 2.0)

    def step(self, closure=None):
        if not self.training:
            raise RuntimeError("not in train mode")
        return super().step(closure)


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_base_with_modes_trains_in_one_and_is_judged_in_the_other(setup, one_pass):
    model = nn.Sequential(nn.Linear(5, 3))
    sizes = []

    def scored(model):
        sizes.append(float(model[0].weight.detach().norm()))
        return 0.0

    given = {**setup, "model": model, "score": scored}
    options = {"methods": (nusam.NuSAM,), "rhos": (0.1,), "steps": 2, "seeds": 1, "confirm": 2, "one_pass": one_pass}
    nusam.find_rho(**{**given, "base": lambda copy: Averaged(copy.parameters(), lr=0.0)}, **options)
    assert sizes == pytest.approx([float(model[0].weight.detach().norm())] * len(sizes))
    schedulefree = pytest.importorskip("schedulefree")
    given["base"] = lambda copy: schedulefree.AdamWScheduleFree(copy.parameters(), lr=1e-2)
    found = nusam.find_rho(**given, **options)
    opt = found.verdict.go_on(model, given["base"])
    opt.train()
    loss(model, next(iter(setup["loader"]))).backward()
    opt.step()
