"""νSAM behind timm's factory, in timm's training loop, and in the example."""

import copy
import re
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nusam
from nusam.reference import svd_top1
from tests.conftest import batch, loss_of, mlp, train_step, weights

timm = pytest.importorskip("timm")

from timm.optim import Lookahead, create_optimizer_v2, list_optimizers, optimizer_kwargs  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402
from timm.utils import NativeScaler, ParseKwargs, dispatch_clip_grad  # noqa: E402

from nusam.integrations.timm import update  # noqa: E402

ROOT = Path(__file__).parents[1]
BASES = [name.removeprefix("nusam-") for name in list_optimizers("nusam-*")]
RHO, DELAY, STEPS = 0.07, 2, 6


def warm_starts(opt, model):
    """u of every matrix, as the optimizer starts from them."""
    saved = opt.state_dict()["state"]
    parameters = [p for group in opt.param_groups for p in group["params"]]
    us = {p: saved[i]["nusam_u"].clone() for i, p in enumerate(parameters) if "nusam_u" in saved.get(i, {})}
    return [us[p] for p in model.parameters() if p.ndim == 2]


def brute_force(model, base, us, loss, parts=1, after_step=lambda: None, prepare=lambda: None, steps=STEPS):
    """νSAM by copying weights, micro-batch by micro-batch, around a base optimizer that knows of nothing."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    for step in range(steps):
        base.zero_grad()
        for part in range(parts):
            held = [p.detach().clone() for p in matrices]
            if step >= DELAY:
                gradients = torch.autograd.grad(loss(model, step * parts + part) / parts, matrices)
                for i, (p, G) in enumerate(zip(matrices, gradients, strict=True)):
                    us[i], v = svd_top1(G / G.abs().max(), us[i])
                    p.data.add_(RHO * torch.outer(us[i], v))
            (loss(model, step * parts + part) / parts).backward()
            for p, w in zip(matrices, held, strict=True):
                p.data.copy_(w)
        prepare()
        base.step()
        after_step()


def assert_equal_weights(model, expected, tolerance):
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


COMMON = {"sgd", "momentum", "adam", "adamw", "lamb", "lion", "muon", "adafactor", "nadamw"}


def test_the_bases_that_timm_has_are_there():
    assert set(BASES) >= COMMON
    left_out = {name for name in list_optimizers(exclude_filters=["*-*"]) if name not in BASES}
    assert {name for name in left_out if not name.startswith(("fused", "bnb"))} == {"adahessian", "adadelta"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "base", [pytest.param(name, marks=[] if name in COMMON else [pytest.mark.slow]) for name in BASES]
)
def test_around_every_base_of_timm_steps_equal_a_brute_force_loop(base):
    model = mlp(torch.float64)
    expected = copy.deepcopy(model)
    arguments = {"lr": 1e-3, "weight_decay": 0.1}
    opt = create_optimizer_v2(model, f"nusam-{base}", **arguments, rho=RHO, delay=DELAY, model=model)
    assert isinstance(opt, nusam.NuSAM)
    alone = create_optimizer_v2(expected, base, **arguments)
    assert type(opt.base_optimizer) is type(alone)
    groups = [{k: v for k, v in group.items() if k not in ("params", "rho")} for group in opt.param_groups]
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in alone.param_groups]
    us = warm_starts(opt, model)
    before = weights(model)
    torch.manual_seed(3)  # Kron draws its probes
    for step in range(STEPS):
        train_step(model, opt, step)
    torch.manual_seed(3)
    brute_force(expected, alone, us, loss_of)
    assert not torch.equal(before[0], model[0].weight)
    # some of them keep their state in bfloat16, which magnifies the last bits of a gradient
    assert_equal_weights(model, expected, 1e-4 if base.endswith("muon") or "kron" in base else 1e-9)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("nusam", nusam.NuSAM), ("nusamnorm", nusam.NuSAMNorm), ("sam", nusam.SAM), ("samon", nusam.SAMON)],
)
def test_every_method_and_its_arguments(prefix, kind):
    model = mlp()
    opt = create_optimizer_v2(model, f"{prefix}-sgd", lr=0.1, momentum=0.8, rho=0.3, delay=7, seed=3, model=model)
    assert type(opt) is kind
    assert (opt.delay, opt.seed, opt.model) == (7, 3, model)
    assert all(group["rho"] == 0.3 and group["momentum"] == 0.8 and group["nesterov"] for group in opt.param_groups)


def test_layer_decay_is_timms_own():
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=10, depth=2)
    arguments = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.7}
    opt = create_optimizer_v2(model, "nusam-adamw", **arguments, rho=0.01, power_iterations=2, model=model)
    alone = create_optimizer_v2(model, "adamw", **arguments)
    assert len(opt.param_groups) == len(alone.param_groups) > 4
    for ours, theirs in zip(opt.param_groups, alone.param_groups, strict=True):
        assert ours["params"] == theirs["params"]
        assert (ours["lr_scale"], ours["weight_decay"]) == (theirs["lr_scale"], theirs["weight_decay"])
    assert opt.lmo.power_iterations == 2
    for _ in opt.passes():
        model(torch.randn(2, 1, 8, 8)).square().mean().backward()
    opt.step()
    metrics = opt.metrics()
    assert metrics["epsilon/blocks.1.mlp.fc1.weight"] == pytest.approx(0.01, rel=1e-5)
    assert not any(name.startswith("fallback") for name in metrics)


def test_the_command_line_of_train_py():
    parser = ArgumentParser()
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    args = parser.parse_args(["--opt", "nusam-lamb", "--opt-kwargs", "rho=0.02", "delay=30", "trust_clip=True"])
    args.lr, args.weight_decay, args.momentum = 1e-3, 0.05, 0.9
    opt = create_optimizer_v2(mlp(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert (opt.delay, opt.param_groups[0]["rho"], opt.param_groups[0]["trust_clip"]) == (30, 0.02, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rhoo'"):
        create_optimizer_v2(mlp(), "nusam-adamw", rhoo=0.1)


def test_it_is_copied_like_any_other():
    model = mlp()
    opt = create_optimizer_v2(model, "nusam-adamw", lr=1e-3, model=model)
    other, twin = copy.deepcopy((model, opt))
    train_step(model, opt)
    train_step(other, twin)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_lookahead_around_us_is_refused_and_within_us_equals_a_brute_force_loop():
    model = mlp(torch.float64)
    with pytest.raises(TypeError, match="hide its passes; wrap it the other way round"):
        create_optimizer_v2(model, "lookahead_nusam-adamw", lr=1e-2)

    def build(model):
        return create_optimizer_v2(model, "lookahead_adamw", lr=1e-2, weight_decay=0.1)

    expected, resumed = copy.deepcopy(model), None
    opt = nusam.NuSAM(build(model), rho=RHO, delay=DELAY, model=model)
    us = warm_starts(opt, model)
    for step in range(16):  # slow weights move every sixth step
        if step == 8:
            resumed = copy.deepcopy(model)
            again = nusam.NuSAM(build(resumed), rho=RHO, delay=DELAY, model=resumed)
            again.load_state_dict(copy.deepcopy(opt.state_dict()))
        train_step(model, opt, step)
        if resumed is not None:
            train_step(resumed, again, step)
    alone = build(expected)
    assert isinstance(alone, Lookahead)
    brute_force(expected, alone, us, loss_of, steps=16)
    assert_equal_weights(model, expected, 1e-9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


# ---------------------------------------------------------------- the diffs to train.py


def sides(diff, side):
    """The lines of a diff on one side, "-" or "+"."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line or line[0] in (" ", side))


def the_diffs():
    page = (ROOT / "docs" / "timm.md").read_text()
    return re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL)


def train_py(
    side, model, *, accum_steps=1, clip_grad=None, clip_mode="norm", scaler=None, amp=nullcontext, **opt_kwargs
):
    """timm's loop with the documented lines in it, before ("-") or after ("+") the change."""
    creation, imports, inner, wrapped = the_diffs()
    args = SimpleNamespace(opt="adamw" if side == "-" else "nusam-adamw", lr=1e-2, weight_decay=0.1, momentum=0.9)
    args.clip_grad, args.clip_mode, args.opt_kwargs = clip_grad, clip_mode, opt_kwargs
    scope = {
        "model": model,
        "task": ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False),
        "args": args,
        "create_optimizer_v2": create_optimizer_v2,
        "optimizer_kwargs": optimizer_kwargs,
        "utils": SimpleNamespace(dispatch_clip_grad=dispatch_clip_grad),
        "model_parameters": timm.models.model_parameters,
        "loss_scaler": scaler,
        "amp_autocast": amp,
        "second_order": False,
        "has_no_sync": hasattr(model, "no_sync"),
        "accum_steps": accum_steps,
    }
    exec(sides(imports, side), scope)
    exec("if True:\n" + sides(creation, side), scope)
    if hasattr(scope["task"].trainable_module, "module"):
        exec("if True:\n" + sides(wrapped, side), scope)
    optimizer = scope["optimizer"]
    optimizer.zero_grad()
    for micro in range(STEPS * accum_steps):
        scope["input"], scope["target"] = batch(micro, next(model.parameters()).dtype)
        scope["need_update"] = (micro + 1) % accum_steps == 0
        exec("if True:\n" + sides(inner, side), scope)
        if scope["need_update"]:
            optimizer.zero_grad()
    scope.clear()  # its functions hold it, and it the optimizer


@pytest.mark.parametrize("accum_steps", [1, 3])
@pytest.mark.parametrize(("clip_grad", "clip_mode"), [(None, "norm"), (0.1, "norm"), (0.01, "value"), (0.02, "agc")])
def test_the_changed_loop_equals_timms_own_around_a_brute_force_perturbation(accum_steps, clip_grad, clip_mode):
    model = mlp(torch.float64)
    timms, off, expected = (copy.deepcopy(model) for _ in range(3))
    options = {"accum_steps": accum_steps, "clip_grad": clip_grad, "clip_mode": clip_mode}
    train_py("-", timms, **options)
    train_py("+", off, **options, rho=0.0)
    assert all(torch.equal(p, q) for p, q in zip(timms.parameters(), off.parameters(), strict=True))

    us = warm_starts(create_optimizer_v2(expected, "nusam-adamw", lr=1e-2, weight_decay=0.1), expected)
    train_py("+", model, **options, rho=RHO, delay=DELAY)
    base = create_optimizer_v2(expected, "adamw", lr=1e-2, weight_decay=0.1)

    def clip():
        if clip_grad is not None:
            parameters = timm.models.model_parameters(expected, exclude_head="agc" in clip_mode)
            dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)

    brute_force(expected, base, us, loss_of, accum_steps, prepare=clip)
    assert_equal_weights(model, expected, 1e-9)
    assert (model[0].weight - timms[0].weight).abs().max() > 1e-4


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_the_changed_loop_with_timms_scaler(accum_steps):
    def amp():
        return torch.autocast("cpu", torch.float16)

    model = mlp()
    timms, off, plain = (copy.deepcopy(model) for _ in range(3))
    options = {"accum_steps": accum_steps, "clip_grad": 0.1}
    train_py("-", timms, **options, scaler=NativeScaler("cpu"), amp=amp)
    train_py("+", off, **options, scaler=NativeScaler("cpu"), amp=amp, rho=0.0)
    assert all(torch.equal(p, q) for p, q in zip(timms.parameters(), off.parameters(), strict=True))
    train_py("+", model, **options, scaler=NativeScaler("cpu"), amp=amp, rho=RHO)
    train_py("+", plain, **options, rho=RHO)
    assert_equal_weights(model, plain, 2e-2)  # float16 beside float32
    assert (model[0].weight - timms[0].weight).abs().max() > 1e-4


def test_an_overflow_skips_the_step_and_leaves_the_weights_unperturbed():
    model = mlp()
    opt = create_optimizer_v2(model, "nusam-adamw", lr=1e-2, rho=RHO, model=model)
    scaler = NativeScaler("cpu")
    before = weights(model)
    for factor in (float("inf"), 1.0):
        for _ in opt.passes():
            scaler(loss_of(model) * factor, opt, need_update=False)
        update(opt, scaler, clip_grad=1.0)
        moved = (model[0].weight - before[0]).abs().max()
        assert moved <= 1e-6 if factor != 1 else moved > 1e-3
    assert scaler.state_dict()["scale"] == 2.0**15


@contextmanager
def processes_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_wrapped_module_takes_the_place_of_the_model():
    from torch.nn.parallel import DistributedDataParallel

    model = mlp(torch.float64)
    alone = copy.deepcopy(model)
    train_py("+", alone, accum_steps=2, rho=RHO, ascent="matrix-free")
    opt = create_optimizer_v2(
        model, "nusam-adamw", lr=1e-2, weight_decay=0.1, rho=RHO, ascent="matrix-free", model=model
    )
    with processes_of_one():
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False).prepare_distributed()
        exec("if True:\n" + sides(the_diffs()[-1], "+"), {"optimizer": opt, "task": task})
        assert isinstance(opt.model, DistributedDataParallel)
        for step in range(STEPS):
            for micro in (2 * step, 2 * step + 1):
                x, y = batch(micro, torch.float64)
                with task.trainable_module.no_sync() if micro % 2 == 0 else nullcontext():
                    for _ in opt.passes(accumulate=True):
                        (task(x, y)["loss"] / 2).backward()
            update(opt)
            opt.zero_grad()
        assert not any(name.startswith("fallback") for name in opt.metrics())
    assert_equal_weights(model, alone, 1e-9)


# ---------------------------------------------------------------- the example


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[], ["--opt", "sam-adamw", "--amp", "--grad-accum-steps", "2", "--clip-grad", "1.0"]]
)
def test_the_example_trains(arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "train_timm.py", "--epochs", "4", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
