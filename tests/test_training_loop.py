"""What a training loop does to an optimizer: scalers, schedules, compilation, counting."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import nusam
from tests.conftest import assert_unperturbed, batch, loss_of, mlp, train_step, weights

METHODS = [nusam.NuSAM, nusam.NuSAMNorm, nusam.SAM, nusam.SAMON, nusam.GaussSAM]


# ------------------------------------------------------------------ gradients that are zero, inf or NaN


def by_gradient(base, **options):
    return nusam.NuSAM(base, ascent="gradient", **options)


def matrix_free(base, **options):
    return nusam.NuSAM(base, ascent="matrix-free", **options)


@pytest.mark.parametrize("kind", [*METHODS, matrix_free])
@pytest.mark.parametrize("where", ["ascent", "descent"])
@pytest.mark.parametrize("poison", [0.0, math.inf, math.nan])
def test_training_survives_a_dead_gradient(kind, where, poison):
    model = mlp()
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    train_step(model, opt)
    u = opt.state_dict()["state"].get(0, {}).get("nusam_u")
    before = weights(model)
    for name in opt.passes():
        (loss_of(model) * (poison if name == where else 1.0)).backward()
        if name == "descent" and where == "ascent" and kind is not nusam.GaussSAM:
            for p, old in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, old)  # perturbed by 0
    assert_unperturbed(model, before)
    if where == "ascent":
        if u is not None:
            assert torch.equal(opt.state_dict()["state"][0]["nusam_u"], u)
        opt.step()
        train_step(model, opt)
        assert all(p.isfinite().all() for p in model.parameters())


def test_one_dead_matrix_does_not_stop_the_others():
    model = mlp()
    opt = by_gradient(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for name in opt.passes():
        loss_of(model).backward()
        if name == "ascent":
            model[0].weight.grad[0, 0] = math.inf
    opt.step()
    metrics = opt.metrics()
    assert metrics["epsilon/0.weight"] == 0.0
    assert metrics["sigma/0.weight"] == 0.0
    assert metrics["epsilon/3.weight"] == pytest.approx(0.05)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_zero_initialized_head_trains_and_the_layers_below_it_come_alive():
    """timm's Mixer starts with a zero head: every other gradient of the first step is exactly zero."""
    timm = pytest.importorskip("timm")
    model = timm.models.mlp_mixer.MlpMixer(
        num_classes=4, img_size=8, in_chans=1, patch_size=4, num_blocks=1, embed_dim=16
    )
    assert model.head.weight.count_nonzero() == 0
    opt = matrix_free(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.01, model=model)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 4, (32,))
    losses = []
    for step in range(60):
        for name in opt.passes():
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if name == "ascent":
                losses.append(loss.item())
        opt.step()
        if step == 0:
            first = opt.metrics()
    names = [name.removeprefix("epsilon/") for name in first if name.startswith("epsilon/")]
    assert [name for name in names if first[f"epsilon/{name}"] > 0] == ["head.weight"]
    assert all(opt.metrics()[f"epsilon/{name}"] == pytest.approx(0.01) for name in names)
    assert losses[-1] < 0.5 * losses[0]


# ------------------------------------------------------------------ loss scaling


def half_problem():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)


@pytest.mark.parametrize("overflow", [None, "ascent", "descent"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_stock_grad_scaler_in_fp16(overflow, clip):
    model, opt = half_problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = batch()

    def step(overflow):
        for name in opt.passes():
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss * (1e30 if name == overflow else 1.0)).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()

    step(None)
    before, u, scale = weights(model), opt.state_dict()["state"][0]["nusam_u"], scaler.get_scale()
    step(overflow)
    after = opt.state_dict()
    if overflow == "descent":  # the scaler skips the step
        assert scaler.get_scale() < scale
        assert_unperturbed(model, before)
        assert after["param_groups"][0]["nusam_steps"] == 1
    else:  # an overflow in the ascent costs this step's perturbation, nothing else
        assert scaler.get_scale() == scale
        assert not torch.equal(model[0].weight, before[0])
        assert after["param_groups"][0]["nusam_steps"] == 2
    assert torch.equal(after["state"][0]["nusam_u"], u) == (overflow == "ascent")
    assert (opt.metrics()["epsilon/0.weight"] == 0) == (overflow == "ascent")
    step(None)
    assert opt.metrics()["epsilon/0.weight"] == pytest.approx(0.05)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("skipped", [False, True])
def test_a_scaler_with_a_closure_is_refused_and_changes_nothing(skipped):
    """accelerate hands its closure over by position, past GradScaler's own guard; scaled gradients would be used."""
    model, opt = half_problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
        scaler.scale(loss).backward()
        return loss

    for _ in opt.passes():
        closure()
    if skipped:  # an overflow, at which the scaler asks, and does not step
        model[0].weight.grad.fill_(math.inf)
        scaler.step(opt)
        scaler.update()
        for _ in opt.passes():
            closure()
    before, saved = weights(model), copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"GradScaler called step\(\) with a closure.*step without a closure\.$"):
        scaler.step(opt, closure)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    for old, new in zip(saved["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert torch.equal(old.get("nusam_u", torch.empty(0)), new.get("nusam_u", torch.empty(0)))
    assert opt.state_dict()["param_groups"] == saved["param_groups"]
    assert torch.isfinite(opt.step(lambda: loss_of_halves(model, opt)))  # without the scaler it is welcome


def loss_of_halves(model, opt):
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", METHODS)
def test_the_loss_scale_changes_nothing(kind):
    plain, scaled = mlp(torch.float64), mlp(torch.float64)
    scaled.load_state_dict(plain.state_dict())
    for model, scale in ((plain, 1.0), (scaled, 2.0**16)):
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        for step in range(3):
            for name in opt.passes():
                (loss_of(model, step) * (scale if name == "ascent" else 1.0)).backward()
            opt.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bfloat16_weights_need_the_model_unless_the_rounding_is_accepted():
    model = mlp(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*pass model=.*keep the weights in float32.*placement='weights'"):
        nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), placement="weights")
    before = weights(model)
    for _ in opt.passes():
        loss_of(model).backward()
    assert_unperturbed(model, before)
    assert opt.state_dict()["state"][0]["nusam_u"].dtype == torch.float32
    nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1))  # keeps a copy, restores it exactly


# ------------------------------------------------------------------ schedules


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda k: 0.9**k},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "ReduceLROnPlateau": {"patience": 1},
    "ChainedScheduler": None,
    "SequentialLR": None,
    "SWALR": {"swa_lr": 0.01, "anneal_epochs": 3},
}


def make_schedule(name, optimizer):
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
        )
    if name == "SequentialLR":
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    module = torch.optim.swa_utils if name == "SWALR" else lr_scheduler
    return getattr(module, name)(optimizer, **SCHEDULERS[name])


def test_no_schedule_of_torch_is_missing_here():
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR of PyTorch 2.6 warns about itself
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_every_schedule_steps_as_with_the_base_optimizer_alone(name, base):
    def run(wrap):
        model = mlp()
        make = {"sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "adamw": torch.optim.AdamW}[base]
        optimizer = make(model.parameters())
        if wrap:
            optimizer = nusam.NuSAM(optimizer)
        schedule = make_schedule(name, optimizer)
        trace = []
        for step in range(8):
            if wrap:
                train_step(model, optimizer, step)
            else:
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            trace.append({key: group.get(key) for key in ("lr", "momentum", "betas", "max_lr", "swa_lr")})
        return trace

    assert run(wrap=True) == run(wrap=False)


# ------------------------------------------------------------------ compilation


def _passes(opt, backward):
    for _ in opt.passes():
        backward()
    opt.step()


def _halves(opt, backward):
    with opt.ascent():
        backward()
    with opt.descent():
        backward()
    opt.step()


def _closure(opt, backward):
    opt.step(backward)


@pytest.mark.parametrize("loop", [_passes, _halves, _closure])
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, matrix_free, nusam.GSAM])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_loop_that_is_compiled_around_the_passes_gives_the_same_weights(kind, loop):
    torch.compiler.reset()
    eager = mlp()
    compiled = copy.deepcopy(eager)
    optimizers = [kind(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.5, model=m) for m in (eager, compiled)]

    def step(model, opt, x, y):
        loop(opt, lambda: nn.functional.cross_entropy(model(x), y).backward())

    fast = torch.compile(step, backend="eager")
    for k in range(3):
        step(eager, optimizers[0], *batch(k))
        fast(compiled, optimizers[1], *batch(k))
        for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, matrix_free])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_training_step_gives_the_same_weights(kind):
    eager = mlp()
    compiled = copy.deepcopy(eager)
    optimizers = [kind(torch.optim.AdamW(m.parameters(), lr=1e-2), delay=1, model=m) for m in (eager, compiled)]

    def step(model, opt, x, y):
        for _ in opt.passes():
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        opt.step()
        return loss

    fast = torch.compile(step)
    for k in range(4):
        step(eager, optimizers[0], *batch(k))
        fast(compiled, optimizers[1], *batch(k))
    assert optimizers[1].active
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_without_a_graph_break():
    model = mlp()
    plain = copy.deepcopy(model)
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-2), model=model)
    plain_opt = nusam.NuSAM(torch.optim.AdamW(plain.parameters(), lr=1e-2), model=plain)
    compiled = torch.compile(model, fullgraph=True)
    for k in range(3):
        train_step(plain, plain_opt, k)
        for _ in opt.passes():
            x, y = batch(k)
            nn.functional.cross_entropy(compiled(x), y).backward()
        opt.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ what a step leaves alone


@pytest.mark.parametrize("kind", [*METHODS, matrix_free])
def test_addresses_and_the_global_generator_are_untouched(kind):
    model = mlp()
    addresses = [p.data_ptr() for p in model.parameters()]
    generator = torch.get_rng_state()
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for step in range(3):
        train_step(model, opt, step)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("kind", METHODS)
def test_a_step_reads_no_value_on_the_host(kind, monkeypatch):
    """``.item()`` and its kin wait for a GPU; on the CPU they can be counted."""
    model = mlp()
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    train_step(model, opt)
    calls = []
    for name in ("tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: calls.append(name))
    item = torch.Tensor.item
    # the marker of a write is one float on the CPU; no parameter or gradient is ever read
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (calls.append("item") if self.ndim else None, item(self))[1])
    train_step(model, opt)
    monkeypatch.undo()
    assert calls == []


@pytest.mark.filterwarnings("ignore:step.. has been called twice without passes")
def test_steps_without_passes_are_plain_base_steps():
    model, bare_model = mlp(), mlp()
    bare_model.load_state_dict(model.state_dict())
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters()))
    bare = torch.optim.AdamW(bare_model.parameters())
    for step in range(3):
        for m, o in ((model, opt), (bare_model, bare)):
            o.zero_grad()
            loss_of(m, step).backward()
            o.step()
    for a, b in zip(model.parameters(), bare_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_metrics_are_flat_numbers_with_the_models_names():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1, model=model)
    assert opt.metrics() == {"active": 1.0, "rho": 0.1}
    gradient = torch.autograd.grad(loss_of(model), model[3].weight)[0]
    for step in range(50):
        del step
        train_step(model, opt)
    metrics = opt.metrics()
    assert metrics["sigma/3.weight"] == pytest.approx(torch.linalg.svdvals(gradient)[0].item(), rel=1e-3)
    assert metrics["epsilon/3.weight"] == pytest.approx(0.1)
    assert set(metrics) == {"active", "rho", *(f"{k}/{n}.weight" for k in ("sigma", "epsilon") for n in (0, 3))}
    named = nusam.NuSAM(torch.optim.SGD(model.named_parameters(), lr=0.0))
    train_step(model, named)
    assert "epsilon/3.weight" in named.metrics()
