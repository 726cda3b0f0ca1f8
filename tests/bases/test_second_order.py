"""Bases that need gradients with a graph are refused; a graph that a loop leaves on gradients does not reach ε."""

import copy

import pytest
import pytorch_optimizer
import timm.optim
import torch

import nusam
from tests.bases.problem import flat, loss_of, net


class Hessianed(torch.optim.SGD):
    is_second_order = True


@pytest.mark.parametrize(
    "make",
    [
        lambda p: pytorch_optimizer.AdaHessian(p),
        lambda p: pytorch_optimizer.SophiaH(p),
        lambda p: timm.optim.Adahessian(p),
        lambda p: timm.optim.Lookahead(timm.optim.Adahessian(p)),
        lambda p: pytorch_optimizer.Lookahead(pytorch_optimizer.SophiaH(p)),
        lambda p: Hessianed(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM])
def test_second_order_bases_are_refused_at_construction(make, kind):
    base = make(net().parameters())
    with pytest.raises(TypeError, match="differentiates its gradients a second time, which the passes do not") as e:
        kind(base)
    assert str(e.value).count(".") == 1
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize(
    "make",
    [
        pytorch_optimizer.APOLLO,
        pytorch_optimizer.ApolloDQN,
        pytorch_optimizer.Shampoo,
        pytorch_optimizer.AdaBelief,
        torch.optim.Adafactor,
    ],
)
def test_first_order_bases_that_only_sound_like_it_are_not(make):
    nusam.SAM(make(net().parameters()))


LMOS = {
    "l2": nusam.lmo.L2(),
    "nuclear": nusam.lmo.Nuclear(),
    "norm": nusam.lmo.NuclearNormalized(),
    "gauss": nusam.lmo.Gaussian(),
    "linf": nusam.lmo.Linf(),
    "spectral": nusam.lmo.Spectral(),
}


@pytest.mark.parametrize("ball", LMOS)
def test_a_gradient_with_a_graph_gives_the_same_perturbation_without_one(ball):
    ends, opts = [], []
    for create_graph in (False, True):
        model = net()
        opt = nusam.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), LMOS[ball], rho=0.01)
        for _ in range(3):
            for _ in opt.passes():
                loss = loss_of(model)
                gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = gradient
            opt.step()
        ends.append(flat(model))
        opts.append(opt)
    assert torch.equal(*ends)
    for opt in opts:
        copy.deepcopy(opt)  # which a state with a graph would refuse
        assert not any(value.requires_grad for entry in opt._states.values() for value in entry.values())
        assert not any(v.requires_grad for values in opt._ascent.measured.values() for v in values.values())
