"""Communication hooks of DDP, whose state the ascent must not move."""

import warnings
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed.problem import RATE, Net, built, sample
from tests.distributed.running import Checks, check

CHECKS: Checks = {2: {}}

STEPS = 5
METHODS = {"NuSAM": nusam.NuSAM, "NuSAMNorm": nusam.NuSAMNorm, "SAM": nusam.SAM, "GaussSAM": nusam.GaussSAM}


def counting():
    """An exact reduction, and the list that it leaves a trace in at every call."""
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        reduced = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    return hook, calls


def trained(method, hook, rho, accumulate=False, unused=False, **options):
    """Some steps of DDP; with no method those of the base optimizer."""
    model = DistributedDataParallel(built(Net), find_unused_parameters=unused)
    if hook is not None:
        model.register_comm_hook(*hook)
    base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    opt = base if method is None else METHODS[method](base, rho, model=model, **options)

    def backward(step):
        x, y = sample(step, dist.get_rank())
        blocks = ((step + dist.get_rank()) % 2,) if unused else (0, 1)
        F.cross_entropy(model(x, blocks), y).backward()

    for step in range(STEPS):
        opt.zero_grad()
        for half in (0, 1) if accumulate else (0,):
            for _ in opt.passes(accumulate=accumulate) if method else (None,):
                backward(2 * step + half)
        opt.step()
    return model


def assert_same(model, other, tolerance):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def moves_in_the_descent_alone(method, accumulate, unused, **options):
    """The weights of DDP's own reduction, and as many calls as the base optimizer alone makes."""
    hook, alone = counting()
    trained(None, (None, hook), 0.0, accumulate, unused)
    hook, ours = counting()
    model = trained(method, (None, hook), 0.1, accumulate, unused, **options)
    assert ours == alone != []
    assert_same(model, trained(method, None, 0.1, accumulate, unused, **options), 1e-10)


for method, accumulate, unused in product(METHODS, (False, True), (False, True)):
    for ascent in ("gradient", "matrix-free") if method == "NuSAM" else ("auto",):
        CHECKS[2][f"hooks: {method} {ascent} {accumulate=} {unused=}"] = partial(
            moves_in_the_descent_alone, method, accumulate, unused, ascent=ascent
        )


@check(2, among=CHECKS)
def a_perturbation_beside_gradients_that_are_views_of_buckets():
    """DDP gives parameters other such views when it has seen a backward, in a forward that may be an ascent's."""
    found = []
    for views, bucket, waits in ((False, 25, False), (True, 25, False), (True, 1e-5, False), (True, 25, True)):
        model = DistributedDataParallel(built(Net), gradient_as_bucket_view=views, bucket_cap_mb=bucket)
        base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        perturbation = nusam.Perturbation(model, 0.1)
        for step in range(8):
            x, y = sample(step, dist.get_rank())
            with model.no_sync() if waits and step % 2 == 0 else nullcontext():
                for xs, ys in perturbation.passes(x, y, ends_step=step % 2 == 1):
                    F.cross_entropy(model(xs), ys).backward()
            if step % 2:
                base.step()
                base.zero_grad()
        found.append(model.module)
    for model in found[1:]:
        assert_same(model, found[0], 1e-10)


def power_sgd(feedback):
    return powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=1,
        start_powerSGD_iter=2,
        min_compression_rate=0.5,
        use_error_feedback=feedback,
        warm_start=True,
        random_seed=1,
    )


@check(2, among=CHECKS)
def hooks_power_sgd_sees_what_it_sees_without_us():
    for method, ascent, feedback in (
        ("NuSAM", "gradient", True),
        ("NuSAM", "matrix-free", True),
        ("NuSAM", "gradient", False),
        ("NuSAMNorm", "auto", True),
        ("SAM", "auto", True),
    ):
        alone, ours = power_sgd(feedback), power_sgd(feedback)
        expected = trained(None, (alone, powerSGD_hook.powerSGD_hook), 0.0)
        model = trained(method, (ours, powerSGD_hook.powerSGD_hook), 1e-9, ascent=ascent)
        assert ours.iter == alone.iter > 2
        assert_same(model, expected, 1e-6)
        for index, error in alone.error_dict.items():
            torch.testing.assert_close(ours.error_dict[index], error, rtol=0, atol=1e-5)


@check(2, among=CHECKS)
def hooks_that_can_not_be_left_out_are_refused():
    model = DistributedDataParallel(built(Net))
    model.register_comm_hook(power_sgd(True), powerSGD_hook.powerSGD_hook)
    for unknown in (None, model.module):
        with pytest.raises(RuntimeError, match="pass the wrapped module as model="):
            nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=RATE), 0.1, model=unknown)
    late = DistributedDataParallel(built(Net))
    opt = nusam.NuSAM(torch.optim.SGD(late.parameters(), lr=RATE), 0.1)
    late.register_comm_hook(power_sgd(True), powerSGD_hook.powerSGD_hook)
    with pytest.raises(RuntimeError, match="pass the wrapped module as model="):
        next(iter(opt.passes()))
    static = DistributedDataParallel(built(Net), static_graph=True)
    static.register_comm_hook(power_sgd(True), powerSGD_hook.powerSGD_hook)
    opt = nusam.NuSAM(torch.optim.SGD(static.parameters(), lr=RATE), 0.1, model=static)
    with pytest.raises(RuntimeError, match="may have a state that the ascent must not move, but DDP with static"):
        next(iter(opt.passes()))


# ------------------------------------------------------------------------------- gradients that are looked for


def scaled_midway(ascent, match, m_sam=False):
    """One process alone scales gradients in its passes, from the fourth step on: a sentence, and no process waits."""
    model = DistributedDataParallel(built(Net))
    base = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = nusam.NuSAM(base, 0.1, model=model, ascent=ascent, m_sam=m_sam)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(STEPS + 2):
            x, y = sample(step, dist.get_rank())
            for _ in opt.passes():
                F.cross_entropy(model(x), y).backward()
                if step >= 3 and dist.get_rank() == 1:
                    for gradient in [p.grad for p in model.parameters() if p.grad is not None]:
                        gradient *= 0.5
            opt.step()
    said = [str(w.message) for w in warned]
    assert len(said) == (dist.get_rank() == 1 and match != ""), said
    assert all(match in sentence for sentence in said)


for name, ascent, match, m_sam in (
    ("matrix-free", "matrix-free", "has its gradient changed by the loop inside the passes", False),
    ("matrix-free m-SAM", "matrix-free", "has its gradient changed by the loop inside the passes", True),
    ("gradient", "gradient", "", False),
):
    CHECKS[2][f"looked for: {name}"] = partial(scaled_midway, ascent, match, m_sam)
