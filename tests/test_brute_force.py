"""Twenty steps of every method equal a loop written here, for every base optimizer and its fast variants."""

import copy

import pytest
import torch
from torch import nn

import nusam
from nusam.reference import nusam_step, svd_top1
from nusam.targets import mixed
from tests.conftest import loss_of, mlp, train_step

STEPS, RHO, DELAY = 20, 0.07, 3

BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd-foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "adam-foreach": lambda ps: torch.optim.Adam(ps, lr=1e-2, foreach=True),
    "adam-fused": lambda ps: torch.optim.Adam(ps, lr=1e-2, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "adafactor-foreach": lambda ps: torch.optim.Adafactor(ps, lr=1e-2, foreach=True),
}
if hasattr(torch.optim, "Muon"):  # since PyTorch 2.9
    BASES["muon"] = lambda ps: torch.optim.Muon(ps, lr=1e-2)
METHODS = {
    "nusam": (nusam.NuSAM, {}),
    "nusam-3-iterations": (nusam.NuSAM, {"power_iterations": 3}),
    "nusam-matrix-free": (nusam.NuSAM, {"ascent": "matrix-free"}),
    "nusam-in-forward": (nusam.NuSAM, {"ascent": "matrix-free", "placement": "forward"}),
    "nusam-norm": (nusam.NuSAMNorm, {}),
    "nusam-norm-matrix-free": (nusam.NuSAMNorm, {"ascent": "matrix-free", "power_iterations": 2}),
    "sam": (nusam.SAM, {}),
    "sam-on": (nusam.SAMON, {}),
    "gauss-sam": (nusam.GaussSAM, {}),
}


def problem(base: str) -> nn.Module:
    """Muon takes matrices only."""
    if base == "muon":
        return nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 4, bias=False)).double()
    return mlp(torch.float64)


def brute_force(model, make_base, method, options, warm_starts):
    """The method as its paper writes it: copy the weights, perturb, differentiate, copy back, step."""
    base = make_base(model.parameters())
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    us = [u.clone() for u in warm_starts]
    for step in range(STEPS):
        if step >= DELAY:
            gradients = torch.autograd.grad(loss_of(model, step), parameters)
            by_parameter = dict(zip(parameters, gradients, strict=True))
            epsilon = {p: torch.zeros_like(p) for p in parameters}
            if method in (nusam.NuSAM, nusam.NuSAMNorm):
                sigmas = []
                for i, p in enumerate(matrices):
                    G = by_parameter[p] / by_parameter[p].abs().max()
                    us[i], v = svd_top1(G, us[i], options.get("power_iterations", 1))
                    epsilon[p] = RHO * torch.outer(us[i], v)
                    sigmas.append(torch.linalg.vector_norm(by_parameter[p] @ v))
                if method is nusam.NuSAMNorm:
                    for p, sigma in zip(matrices, sigmas, strict=True):
                        epsilon[p] *= sigma / torch.linalg.vector_norm(torch.stack(sigmas))
            else:
                perturbed = parameters
                if method is nusam.SAMON:
                    perturbed = list(model[1].parameters())
                if method is nusam.GaussSAM:
                    seed = mixed(0, step)
                    by_parameter = {
                        p: torch.empty_like(p).normal_(generator=torch.Generator().manual_seed(seed + i))
                        for i, p in enumerate(parameters)
                    }
                norm = sum((by_parameter[p] ** 2).sum() for p in perturbed).sqrt()
                for p in perturbed:
                    epsilon[p] = RHO * by_parameter[p].detach() / norm
            original = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.copy_(p + epsilon[p])
        base.zero_grad()
        loss_of(model, step).backward()
        if step >= DELAY:
            with torch.no_grad():
                for p, w in zip(parameters, original, strict=True):
                    p.copy_(w)
        base.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_equal_a_brute_force_loop(base, method):
    kind, options = METHODS[method]
    if base == "muon" and kind is nusam.SAMON:
        pytest.skip("Muon takes matrices, SAM-ON perturbs vectors")
    model = problem(base)
    expected = copy.deepcopy(model)
    opt = kind(BASES[base](model.parameters()), rho=RHO, delay=DELAY, model=model, **options)

    matrices = [i for i, p in enumerate(model.parameters()) if p.ndim == 2]
    warm_starts = [nn.functional.normalize(torch.randn(p.shape[0]).double(), dim=0) for p in model.parameters()]
    if kind in (nusam.NuSAM, nusam.NuSAMNorm):  # hand both loops the same warm starts, through the state dict
        saved = opt.state_dict()
        saved["state"] = {i: {"nusam_u": warm_starts[i]} for i in matrices}
        opt.load_state_dict(saved)

    for step in range(STEPS):
        assert opt.active == (step >= DELAY)
        train_step(model, opt, step)
    brute_force(expected, BASES[base], kind, options, [warm_starts[i] for i in matrices])
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        # Muon orthogonalizes in bfloat16, which magnifies the last bits of the gradient
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 if base == "muon" else 1e-9)


def test_algorithm_1_as_printed():
    """With plain gradient descent on matrices alone, the optimizer is ``reference.nusam_step``."""
    model = problem("muon")
    M = [p.detach().clone() for p in model.parameters()]
    us = [nn.functional.normalize(torch.randn(p.shape[0]).double(), dim=0) for p in M]
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO)
    saved = opt.state_dict()
    saved["state"] = {i: {"nusam_u": u} for i, u in enumerate(us)}
    opt.load_state_dict(saved)
    stand_in = copy.deepcopy(model)

    for step in range(STEPS):

        def gradient(matrices, step=step):
            with torch.no_grad():
                for p, W in zip(stand_in.parameters(), matrices, strict=True):
                    p.copy_(W)
            return torch.autograd.grad(loss_of(stand_in, step), list(stand_in.parameters()))

        M, us = nusam_step(M, us, gradient, RHO, 0.1)
        train_step(model, opt, step)
        for p, W in zip(model.parameters(), M, strict=True):
            torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-9)


def test_the_closure_is_the_loop():
    looped, closed = mlp(), mlp()
    closed.load_state_dict(looped.state_dict())
    a = nusam.NuSAM(torch.optim.AdamW(looped.parameters(), lr=1e-2), delay=2)
    b = nusam.NuSAM(torch.optim.AdamW(closed.parameters(), lr=1e-2), delay=2)
    for step in range(6):
        train_step(looped, a, step)
        unperturbed = loss_of(closed, step).item()

        def closure(step=step):
            b.zero_grad()
            loss = loss_of(closed, step)
            loss.backward()
            return loss

        assert b.step(closure).item() == unperturbed
    for p, q in zip(looped.parameters(), closed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_halves_are_the_loop():
    looped, halved = mlp(), mlp()
    halved.load_state_dict(looped.state_dict())
    a = nusam.SAM(torch.optim.SGD(looped.parameters(), lr=0.1))
    b = nusam.SAM(torch.optim.SGD(halved.parameters(), lr=0.1))
    for step in range(4):
        train_step(looped, a, step)
        with b.ascent():
            loss_of(halved, step).backward()
        with b.descent():
            loss_of(halved, step).backward()
        b.step()
    for p, q in zip(looped.parameters(), halved.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM])
def test_accumulation_perturbs_every_micro_batch_on_its_own(kind):
    """The accumulated gradient is the sum of each micro-batch's own descent gradient."""
    model = mlp(torch.float64)
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1))
    single = kind(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for micro in range(3):
        for _ in single.passes():
            loss_of(model, micro).backward()
        expected = [e + p.grad for e, p in zip(expected, model.parameters(), strict=True)]
    opt.zero_grad()
    for micro in range(3):
        for name in opt.passes(accumulate=True):
            if name == "ascent":
                assert all(p.grad is None for p in model.parameters())
            loss_of(model, micro).backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=0, atol=1e-12)


def test_groups_have_their_own_radius_and_zero_is_never_perturbed():
    model = mlp()
    first, last = model[0], model[3]
    groups = [{"params": first.parameters(), "rho": 0.5}, {"params": last.parameters(), "rho": 0.0}]
    opt = nusam.NuSAM(torch.optim.SGD(groups, lr=0.1))
    assert opt.perturbation_numel() == sum(first.weight.shape)
    before = [first.weight.detach().clone(), last.weight.detach().clone()]
    for name in opt.passes():
        if name == "descent":
            epsilon = first.weight.detach() - before[0]
            torch.testing.assert_close(torch.linalg.svdvals(epsilon)[0], torch.tensor(0.5))
            assert torch.equal(last.weight, before[1])
        loss_of(model).backward()


def test_the_schedule_multiplies_rho_by_its_factor_at_every_step():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.2, rho_schedule=lambda k: (k + 1) ** -0.5)
    for step in range(4):
        train_step(model, opt, step)
        metrics = opt.metrics()
        assert metrics["epsilon/0.0"] == pytest.approx(0.2 * (step + 1) ** -0.5)
        assert metrics["rho"] == pytest.approx(0.2 * (step + 2) ** -0.5)  # of the next step


def test_a_zero_factor_switches_the_passes_off():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho_schedule=lambda k: float(k % 2))
    seen = []
    for step in range(4):
        assert opt.active == (step % 2 == 1)
        for name in opt.passes():
            seen.append(name)
            loss_of(model, step).backward()
        opt.step()
    assert seen == ["descent", "ascent", "descent", "descent", "ascent", "descent"]
