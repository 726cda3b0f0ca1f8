"""A base optimizer that maximizes has the lowest neighbour as its worst one, not the highest."""

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer import Lookahead

import nusam
from tests.bases.problem import flat, loss_of, net

BASES = {
    "sgd": lambda groups, **o: torch.optim.SGD(groups, lr=0.1, momentum=0.9, **o),
    "adam": lambda groups, **o: torch.optim.Adam(groups, lr=0.01, **o),
    "adamw": lambda groups, **o: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, **o),
    "adamw for each": lambda groups, **o: torch.optim.AdamW(groups, lr=0.01, foreach=False, **o),
    "rmsprop": lambda groups, **o: torch.optim.RMSprop(groups, lr=0.01, **o),
    "an attribute": lambda groups, **o: pytorch_optimizer.AdaBelief(groups, lr=0.01, **o),
    "inside another": lambda groups, **o: Lookahead(pytorch_optimizer.AdaBelief(groups, lr=0.01, **o)),
    "a group's, inside another": lambda groups, **o: Lookahead(torch.optim.SGD(groups, lr=0.1, **o)),
}
METHODS = {
    "nusam": lambda base, model: nusam.NuSAM(base, rho=0.1),
    "matrix-free": lambda base, model: nusam.NuSAM(base, rho=0.1, model=model, ascent="matrix-free"),
    "forward": lambda base, model: nusam.NuSAM(base, rho=0.1, model=model, placement="forward"),
    "nusam norm": lambda base, model: nusam.NuSAMNorm(base, rho=0.1),
    "sam": lambda base, model: nusam.SAM(base, rho=0.1),
    "gauss": lambda base, model: nusam.GaussSAM(base, rho=0.1),
    "linf": lambda base, model: nusam.SharpnessAware(base, nusam.lmo.Linf(), rho=0.01),
    "spectral": lambda base, model: nusam.SharpnessAware(base, nusam.lmo.Spectral(), rho=0.01),
}


def train(model, opt, sign, steps=4):
    for _ in range(steps):
        for _ in opt.passes():
            loss_of(model, sign).backward()
        opt.step()
    return flat(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_maximizing_f_is_minimizing_minus_f(base, method):
    up, down = net(), net()
    ends = [
        train(model, METHODS[method](BASES[base](model.parameters(), maximize=maximize), model), sign)
        for model, maximize, sign in ((up, True, 1.0), (down, False, -1.0))
    ]
    assert (ends[0] - ends[1]).abs().max() <= 1e-12
    assert (ends[0] - flat(net())).abs().max() > 1e-3


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("ball", [nusam.lmo.Nuclear(300), nusam.lmo.NuclearNormalized(300), nusam.lmo.L2()])
def test_a_neighbour_is_the_worst_for_the_direction_in_which_the_base_goes(ball, maximize):
    """Finite difference: the descent sees a loss that is higher by what theory says, or lower by as much."""
    model = net()
    opt = nusam.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize), ball, rho=1e-5)
    losses = []
    for name in opt.passes():
        losses.append(loss_of(model))
        losses[-1].backward()
        if name == "ascent":
            gradients = [p.grad.clone() for p in model.parameters()]
    nuclear = isinstance(ball, nusam.lmo.Nuclear)
    sigmas = torch.stack([torch.linalg.svdvals(G)[0] for G in gradients if G.ndim == 2])
    norm = torch.cat([G.flatten() for G in gradients]).norm()
    shared = isinstance(ball, nusam.lmo.NuclearNormalized)
    rise = 1e-5 * ((sigmas.norm() if shared else sigmas.sum()) if nuclear else norm)
    assert (losses[1] - losses[0]).item() == pytest.approx((-rise if maximize else rise).item(), rel=1e-3)
    reported = [value for name, value in opt.metrics().items() if name.startswith("epsilon/")]
    assert min(reported) > 0
    assert sum(value**2 for value in reported) ** 0.5 == pytest.approx(
        1e-5 * (2**0.5 if nuclear and not shared else 1.0), rel=1e-3
    )


@pytest.mark.parametrize("ball", [nusam.lmo.Nuclear(300), nusam.lmo.NuclearNormalized(300), nusam.lmo.L2()])
def test_groups_that_go_opposite_ways_have_opposite_neighbours(ball):
    model = net()
    groups = [{"params": model[0].parameters(), "maximize": True}, {"params": model[2].parameters(), "rho": 0.02}]
    opt = nusam.SharpnessAware(torch.optim.SGD(groups, lr=0.0), ball, rho=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for name in opt.passes():
        loss_of(model).backward()
        if name == "ascent":
            gradients = [p.grad.clone() for p in model.parameters()]
        else:
            epsilons = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    rhos = [-0.01, -0.01, 0.02, 0.02]
    tops = [torch.linalg.svd(G, full_matrices=False) if G.ndim == 2 else None for G in gradients]
    norm = torch.cat([G.flatten() for G in gradients]).norm()
    sigmas = torch.stack([top[1][0] for top in tops if top is not None])
    for epsilon, G, top, rho in zip(epsilons, gradients, tops, rhos, strict=True):
        if isinstance(ball, nusam.lmo.L2):
            expected = rho * G / norm
        elif top is None:
            expected = torch.zeros_like(G)
        else:
            share = top[1][0] / sigmas.norm() if isinstance(ball, nusam.lmo.NuclearNormalized) else 1.0
            expected = rho * share * torch.outer(top[0][:, 0], top[2][0])
        assert (epsilon - expected).abs().max() <= 1e-9


def test_frozen_weights_follow_the_direction_of_the_groups():
    model = net()
    model[0].weight.requires_grad_(False)
    losses = {}
    for maximize in (True, False):
        trained = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.SGD(trained, lr=0.0, maximize=maximize)
        opt = nusam.NuSAM(base, rho=0.1, model=model, targets="frozen")
        seen = []
        for _ in range(3):  # the first steps may find out how the layer is used
            seen = []
            for _ in opt.passes():
                seen.append(loss_of(model))
                seen[-1].backward()
            opt.step()
        losses[maximize] = (seen[-1] - seen[0]).item()
    assert losses[True] < 0 < losses[False]


def test_maximize_may_change_between_steps():
    model = net()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.01)
    gaps = []
    for maximize in (False, True, False):
        opt.param_groups[0]["maximize"] = maximize
        losses = []
        for _ in opt.passes():
            losses.append(loss_of(model))
            losses[-1].backward()
        opt.step()
        gaps.append((losses[1] - losses[0]).item())
    assert gaps[1] < 0 < gaps[0] == gaps[2]


class Wrapping(torch.optim.Optimizer):
    """A wrapper as users write them, whose own maximize turns round what the optimizer inside does."""

    def __init__(self, inner, maximize):
        self.inner, self.maximize, self.defaults = inner, maximize, inner.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        for group in self.param_groups if self.maximize else ():
            for p in group["params"]:
                p.grad.neg_()
        self.inner.step()


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True), (False, False)])
def test_two_turns_are_none(outer, inner):
    ends = []
    for outer_, inner_, sign in ((outer, inner, 1.0), (False, False, -1.0 if outer != inner else 1.0)):
        model = net()
        base = Wrapping(torch.optim.SGD(model.parameters(), lr=0.1, maximize=inner_), outer_)
        ends.append(train(model, nusam.SAM(base, rho=0.1), sign))
    assert (ends[0] - ends[1]).abs().max() <= 1e-12
