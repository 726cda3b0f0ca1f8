"""coverage() counts what is perturbed and names what is not; a method that reaches little says so once."""

import copy
import warnings

import pytest
import torch
from torch import nn

import nusam


class Mixture(nn.Module):
    """A stack of matrices in one parameter, as mixture-of-experts layers hold them."""

    def __init__(self, experts=4, n=5, m=6):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(experts, n, m) / 3)
        self.head = nn.Linear(n, 2)

    def forward(self, x):
        return self.head(torch.einsum("enm,bm->bn", self.stack, x))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4 * 4, 2)
    )  # 216 + 8 + 16 + 256 + 2


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


class Adapted(nn.Module):
    """Frozen layers under what is trained, of which one is used otherwise than by a call, or now and then."""

    def __init__(self, use):
        super().__init__()
        self.use, self.steps = use, 0
        self.first, self.second = nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 4).requires_grad_(False)
        self.adapter, self.head = nn.Linear(6, 6), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.first(self.adapter(x)))
        return self.head(self.use(self, x))


USES = {
    "never": lambda model, x: x[:, :4],
    "by .data": lambda model, x: nn.functional.linear(x, model.second.weight.data),
    "detached": lambda model, x: x @ model.second.weight.detach().T,
    "without gradients": lambda model, x: x[:, :4] + model.second(x).detach(),
    "from the fourth step on": lambda model, x: model.second(x) if model.steps >= 3 else x[:, :4],
    "but for the first step": lambda model, x: model.second(x) if model.steps else x[:, :4],
    "always": lambda model, x: model.second(x),
    "now and then": lambda model, x: model.second(x) if model.steps % 2 == 0 else x[:, :4],
}
REACHED = ("always", "now and then")
LATER = ("from the fourth step on", "but for the first step")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("targets", ["frozen", lambda name, _: "first" in name or "second" in name])
def test_a_frozen_target_that_the_ascent_does_not_reach_is_told_once_and_not_counted(use, targets):
    model = Adapted(USES[use]).double()
    opt = nusam.NuSAM(sgd(model), rho=0.3, model=model, targets=targets)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model.steps in range(5):
            step(opt, model, torch.randn(8, 6, dtype=torch.float64))
    told = [
        str(w.message) for w in caught if "second.weight is frozen, got no gradient in the ascent" in str(w.message)
    ]
    assert len(told) == (use not in REACHED)
    counts = use in (*REACHED, *LATER)
    assert opt.coverage().perturbed == 30 + 20 * counts
    assert ("second.weight" in opt.coverage().left_out) == (not counts)
    assert ("epsilon/second.weight" in opt.metrics()) == counts


def test_what_a_trained_copy_stands_in_for_is_not_counted_and_not_told():
    """As PEFT's modules_to_save keeps a layer that it trains a copy of."""

    class Replaced(nn.Module):
        def __init__(self):
            super().__init__()
            self.original, self.trained = nn.Linear(5, 4).requires_grad_(False), nn.Linear(5, 4)

        def forward(self, x):
            return self.trained(x)

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5).requires_grad_(False), Replaced()).double()
    opt = nusam.NuSAM(sgd(model), rho=0.3, model=model, targets="frozen")
    step(opt, model, torch.randn(8, 6, dtype=torch.float64))  # a warning would be an error
    assert opt.coverage().perturbed == 30
    assert opt.coverage().left_out["2.original.weight"].endswith("got no gradient in the ascents")


def step(opt, model, x):
    for _ in opt.passes():
        model(x).square().mean().backward()
    opt.step()


def by_hand(opt, model):
    """What a step moves in the descent, seen from outside: the entries of every weight that has an ε."""
    before, seen = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for _ in opt.passes():
        seen = {n: not torch.equal(p, before[n]) for n, p in model.named_parameters()}
        model(X(model)).square().mean().backward()
    opt.step()
    return seen


def X(model):
    return torch.randn(8, 3, 6, 6) if isinstance(model, nn.Sequential) else torch.randn(8, 6)


@pytest.mark.filterwarnings("ignore:.*less than a tenth")
@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("build", [convolutional, Mixture])
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.NuSAMNorm, nusam.SAM, nusam.GaussSAM])
def test_it_counts_what_a_step_moves(kind, build, with_model):
    model = build()
    opt = kind(sgd(model), rho=0.5, model=model if with_model else None)
    found = opt.coverage()
    moved = by_hand(opt, model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert found.trainable == sum(sizes.values())
    assert found.perturbed == sum(size for name, size in sizes.items() if moved[name])
    assert found.share == found.perturbed / found.trainable
    if with_model:
        assert found.left_out.keys() == {name for name in sizes if not moved[name]}
    assert opt.coverage() == found


def test_convolutions_and_stacks_of_experts_are_named_with_their_shapes():
    model = Mixture()
    left_out = nusam.NuSAM(sgd(model), model=model).coverage().left_out
    assert left_out["stack"] == "(4, 5, 6): NuSAM perturbs a 2-D parameter only"
    model = convolutional()
    found = nusam.NuSAM(sgd(model)).coverage()  # without the model names are the groups'
    assert found.left_out["0.0"] == "(8, 3, 3, 3): NuSAM perturbs a 2-D parameter only"
    assert (found.perturbed, found.trainable) == (256, 216 + 8 + 16 + 256 + 2)
    found = nusam.SAMON(sgd(model), model=model).coverage()
    assert (found.perturbed, found.left_out["3.weight"]) == (
        16,
        "(2, 128): SAMON perturbs a parameter of a normalization layer only",
    )


def test_every_other_reason_has_its_words():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False))
    model.append(nn.Linear(6, 7, bias=False).requires_grad_(False))
    groups = [{"params": [model[0].weight], "rho": 0.0}, {"params": [model[2].weight]}]
    found = nusam.NuSAM(torch.optim.SGD(groups, lr=0.1), model=model).coverage()
    assert (found.perturbed, found.trainable) == (30, 12 + 20 + 30)
    assert found.left_out == {"0.weight": "(4, 3): rho is 0", "1.weight": "(5, 4): not held by the optimizer"}
    opt = nusam.NuSAM(torch.optim.SGD(groups, lr=0.1), model=model, targets=lambda name, p: name != "1.weight")
    assert opt.coverage().left_out["1.weight"] == "(5, 4): left out by targets="
    frozen = nusam.NuSAM(torch.optim.SGD([model[2].weight], lr=0.1), model=model[2:], targets="frozen").coverage()
    assert frozen == (42, 42, {})


def test_delay_and_schedule_do_not_count():
    model = Mixture()
    options = {"delay": 100, "rho_schedule": lambda step: 0.0}
    assert nusam.NuSAM(sgd(model), **options).coverage() == nusam.NuSAM(sgd(model)).coverage()
    assert nusam.SAM(sgd(model), rho=0.0).coverage().share == 0


def test_a_tied_weight_counts_once_and_a_parameter_beside_the_model_counts_too():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    beside = nn.Parameter(torch.ones(3))
    found = nusam.SAM(torch.optim.SGD([*model.parameters(), beside], lr=0.1), model=model).coverage()
    assert (found.perturbed, found.trainable) == (19, 19)


LITTLE = "NuSAM perturbs a 2-D parameter only, which is 10 of the 135 entries handed to it, less than a tenth"


@pytest.mark.parametrize("delay", [0, 2])
def test_a_method_that_reaches_little_says_so_once_at_the_first_perturbed_step(delay):
    model, x = Mixture(), torch.randn(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = nusam.NuSAM(sgd(model), delay=delay)
        opt.coverage()
        for _ in range(delay):
            step(opt, model, x)
    with pytest.warns(UserWarning, match="less than a tenth; opt.coverage\\(\\) names the others") as told:
        step(opt, model, x)
    assert LITTLE.replace("135", "132") in str(told[0].message)
    assert str(told[0].message).count(". ") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(opt, model, x)
        step(copy.deepcopy(opt), model, x)


def test_what_was_meant_says_nothing():
    model, x = Mixture(), torch.randn(8, 6)
    frozen, vectors = Mixture(), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2000))
    frozen.stack.requires_grad_(False)
    alone = [model.head.weight]
    groups = [{"params": [model.stack], "rho": 0.0}, {"params": alone}]
    quiet = {
        "all of it": (nusam.SAM(sgd(model)), model),
        "a radius of 0": (nusam.NuSAM(torch.optim.SGD(groups, lr=0.1)), model),
        "the matrices alone": (nusam.NuSAM(torch.optim.SGD(alone, lr=0.1)), model),
        "a frozen stack": (nusam.NuSAM(sgd(frozen)), frozen),
        "targets": (nusam.NuSAM(sgd(model), model=model, targets=lambda name, p: name == "head.weight"), model),
        "normalization layers": (nusam.SAMON(sgd(vectors), model=vectors), vectors),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for opt, net in quiet.values():
            step(opt, net, x)
