"""What is checked in several processes; see :mod:`tests.distributed.running`."""

import gc
import shutil
import tempfile
from contextlib import nullcontext
from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import nusam
from collectives import Collectives
from nusam.ascent.products import LayerGradient
from tests.distributed.engines import (
    DEVICE,
    ENGINES,
    STEPS,
    Net,
    base_optimizer,
    ddp,
    fsdp,
    full,
    micro_batches,
    sample,
    shares,
    train,
)
from tests.distributed.matrix import PATHS, cells
from tests.distributed.running import CHECKS, check

METHODS = {"NuSAM": nusam.NuSAM, "NuSAMNorm": nusam.NuSAMNorm, "SAM": nusam.SAM}
EVERY_METHOD = {**METHODS, "SAMON": nusam.SAMON, "GaussSAM": nusam.GaussSAM}
EXACT = torch.float64, 1e-10


def build(method, model, base, **options):
    """The method around a base optimizer of the model, which is handed over."""
    return METHODS[method](base_optimizer(base, model), 0.1, model=model, **options)


@cache
def trained_alone(method="NuSAM", base="SGD", accumulate=False, dtype=torch.float64, steps=STEPS):
    """The same in a single process, which every engine is compared with."""
    alone = Net(dtype)
    opt = EVERY_METHOD[method](base_optimizer(base, alone), 0.1, model=alone)
    train(alone, opt, dtype, accumulate, steps=steps)
    return alone


def equals_one_process(engine, method, base, accumulate, dtype=torch.float64, tolerance=1e-10, **options):
    """Train here together and alone on the joint batch; every weight must come out the same."""
    alone = trained_alone(method, base, accumulate, dtype)
    together = ENGINES[engine][1](Net(dtype))
    opt = build(method, together, base, **options)
    train(together, opt, dtype, accumulate, *shares(engine))
    difference = max(
        (full(p).detach() - q.detach()).abs().max().item()
        for p, q in zip(together.parameters(), alone.parameters(), strict=True)
    )
    assert difference <= tolerance, difference
    assert not [key for key in opt.metrics() if key.startswith("fallback")]
    return difference


for size in CHECKS:
    for cell in cells(size):
        engine, method, ascent, placement, base, accumulate = cell
        case = partial(equals_one_process, engine, method, base, accumulate, ascent=ascent, placement=placement)
        CHECKS[size][f"{engine} {method} {base} {accumulate=} {ascent} {placement}"] = case


def reference_of_m_sam(groups, steps, base="SGD", **options):
    """Every group of samples by an optimizer of its own at the same weights, and the mean of their gradients."""
    model = Net(torch.float64)
    step_of = base_optimizer(base, model)
    owners = [
        nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), 0.1, model=model, placement="forward", **options)
        for _ in range(groups)
    ]
    for step in range(steps):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for part, opt in enumerate(owners):
            train(model, opt, torch.float64, parts=groups, part=part, steps=1, first=step)
            torch._foreach_add_(total, [p.grad for p in model.parameters()])
        for p, gradient in zip(model.parameters(), total, strict=True):
            p.grad = gradient / groups
        step_of.step()
    return model


def m_sam_equals_its_reference(ascent, placement, engine="DDP"):
    size = dist.get_world_size()
    reference = reference_of_m_sam(size, STEPS, ascent="gradient")
    together = ENGINES[engine][1](Net(torch.float64))
    opt = build("NuSAM", together, "SGD", m_sam=True, ascent=ascent, placement=placement)
    train(together, opt, torch.float64, parts=size, part=dist.get_rank())
    assert_same_weights(together, reference)


def assert_same_weights(together, alone, tolerance=1e-10):
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=tolerance)


def assert_bit_equal_on_all_ranks(model):
    for p in model.parameters():
        mine = full(p).detach()
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)


for ascent, placement in product(("gradient", "matrix-free"), ("weights", "forward")):
    # the usual ways in four processes, too
    for size in (2, 4) if (ascent, placement) in PATHS[:2] else (2,):
        CHECKS[size][f"DDP m-SAM NuSAM {ascent} {placement}"] = partial(m_sam_equals_its_reference, ascent, placement)
for size in (2, 4):
    CHECKS[size]["FSDP2 m-SAM NuSAM matrix-free forward"] = partial(
        m_sam_equals_its_reference, "auto", "auto", engine="FSDP2"
    )


def a_group_shares(ascent, placement):
    """Four processes, two groups: each group's ε comes from its half of the batch."""
    reference = reference_of_m_sam(2, STEPS, ascent="gradient")
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    together = ENGINES["DDP"][1](Net(torch.float64))
    m_sam = groups[dist.get_rank() // 2]
    opt = build("NuSAM", together, "SGD", m_sam=m_sam, ascent=ascent, placement=placement)
    train(together, opt, torch.float64, parts=4, part=dist.get_rank())
    assert_same_weights(together, reference)


for ascent, placement in PATHS[2:]:
    CHECKS[4][f"groups of ranks share ε: {ascent} {placement}"] = partial(a_group_shares, ascent, placement)


@check(2)
def m_sam_leaves_the_same_bits_after_a_thousand_steps():
    # where ε is never written, or comes off by a copy, what differs does so at once
    for placement, method, steps in (("weights", "NuSAM", 1000), ("forward", "NuSAM", 100), ("weights", "SAM", 100)):
        model = ENGINES["DDP"][1](Net(torch.float32))
        ascent = "auto" if method == "SAM" else "matrix-free"
        opt = build(method, model, "AdamW", m_sam=True, placement=placement, ascent=ascent)
        train(model, opt, torch.float32, parts=2, part=dist.get_rank(), steps=steps)
        assert_bit_equal_on_all_ranks(model)


@check(2, 4)
def several_power_iterations():
    for engine, ascent in product(("DDP", "FSDP2"), ("gradient", "matrix-free")):
        equals_one_process_at(engine, ascent, power_iterations=3)


def equals_one_process_at(engine, ascent, **options):
    alone, together = Net(torch.float64), ENGINES[engine][1](Net(torch.float64))
    train(alone, build("NuSAM", alone, "SGD", **options), torch.float64)
    opt = build("NuSAM", together, "SGD", ascent=ascent, **options)
    train(together, opt, torch.float64, False, *shares(engine))
    assert_same_weights(together, alone)


@check(2, 4)
def single_precision():
    for engine, ascent in product(("DDP", "FSDP2"), ("gradient", "matrix-free")):
        equals_one_process(engine, "NuSAM", "AdamW", False, torch.float32, 1e-5, ascent=ascent)


# ------------------------------------------------------------------------------- collectives


def counted(engine, dtype=torch.float32, **options):
    """Collectives of a forward and backward without us, of the ascent, of the descent and of the step."""
    model = ENGINES[engine][1](Net(dtype))
    opt = build(options.pop("method", "NuSAM"), model, "AdamW", **options)
    parts, part = shares(engine)
    x, y = (t.chunk(parts)[part] for t in sample(0, dtype))

    def backward():
        nn.functional.cross_entropy(model(x), y).backward()

    train(model, opt, dtype, False, parts, part, steps=5)  # then no comparison with gradients is due
    with Collectives() as plain:
        backward()
    opt.zero_grad()
    with Collectives() as ascent, opt.ascent():
        backward()
    with Collectives() as descent, opt.descent():
        backward()
    with Collectives() as step:
        opt.step()
    assert step.calls == []
    return plain, ascent, descent, model


@check(2, 4)
def fsdp2_adds_one_collective_more_than_iterations():
    for iterations in (1, 3):
        plain, ascent, descent, _ = counted("FSDP2", ascent="gradient", power_iterations=iterations)
        assert plain.count() > 0
        assert ascent.count() == plain.count() + iterations + 1, (ascent.calls, plain.calls)
        assert ascent.count("allreduce") == iterations + 1
        assert descent.count() == plain.count()
        assert ascent.count("allgather") == plain.count("allgather")
    plain, ascent, descent, _ = counted("FSDP2", method="SAM")
    assert ascent.count() == plain.count() + 2
    return [plain.calls, ascent.calls]


@check(2, 4)
def fsdp2_reduces_no_gradient_in_a_matrix_free_ascent():
    plain, ascent, descent, model = counted("FSDP2", ascent="matrix-free", placement="forward")
    assert plain.count("reducescatter") > 0
    assert ascent.count("reducescatter") == 0, ascent.calls
    assert ascent.count("allreduce") == 2
    assert ascent.count("allgather") == plain.count("allgather")
    assert descent.count() == plain.count()
    assert ascent.bytes("allreduce") <= 4 * vectors(model)


def vectors(model):
    return sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)


@check(2, 4)
def ddp_matrix_free_moves_vectors_or_nothing():
    plain, ascent, descent, model = counted("DDP", ascent="matrix-free")
    assert plain.count() > 0
    assert ascent.count() == 2
    assert 0 < ascent.bytes() <= 4 * vectors(model)
    assert descent.calls == plain.calls
    for ascent_by in ("gradient", "matrix-free"):
        plain, ascent, descent, _ = counted("DDP", ascent=ascent_by, m_sam=True)
        assert ascent.calls == []
        assert descent.calls == plain.calls
    plain, ascent, descent, _ = counted("DDP", ascent="gradient")
    assert ascent.calls == plain.calls == descent.calls


@check(4)
def several_meshes_add_two_collectives_each():
    for engine, meshes in (("HSDP", 1), ("FSDP+TP", 2)):
        plain, ascent, _, _ = counted(engine, ascent="gradient")
        assert ascent.count() == plain.count() + 2 * meshes, (ascent.calls, plain.calls)
        assert ascent.count("gather") == plain.count("gather")


# ------------------------------------------------------------------------------- what goes wrong


@check(2, 4)
def a_nan_on_one_rank_is_the_same_for_all():
    for engine, ascent, method in (
        ("DDP", "gradient", "NuSAM"),
        ("DDP", "matrix-free", "NuSAM"),
        ("FSDP2", "gradient", "NuSAM"),
        ("FSDP2", "matrix-free", "NuSAM"),
        ("FSDP2", "gradient", "NuSAMNorm"),
        ("FSDP2", "auto", "SAM"),
        ("DDP", "auto", "SAM"),
    ):
        model = ENGINES[engine][1](Net(torch.float32))
        opt = build(method, model, "AdamW", ascent=ascent)
        parts, part = shares(engine)
        train(model, opt, torch.float32, False, parts, part, steps=2)
        x, y = (t.chunk(parts)[part] for t in sample(9, torch.float32))
        for name in opt.passes():
            poison = float("nan") if name == "ascent" and dist.get_rank() == 1 else 1.0
            nn.functional.cross_entropy(model(x * poison), y).backward()
        assert {v for k, v in opt.metrics().items() if k.startswith("epsilon/")} == {0.0}
        opt.step()
        assert_bit_equal_on_all_ranks(model)
        assert all(full(p).isfinite().all() for p in model.parameters())
        train(model, opt, torch.float32, False, parts, part, steps=2)
        assert max(v for k, v in opt.metrics().items() if k.startswith("epsilon/")) > 0


@check(2)
def nothing_stays_perturbed_without_a_learning_rate():
    for reshard, placement, method in product((True, False), ("weights", "forward"), ("NuSAM", "SAM")):
        if method == "SAM" and placement == "forward":
            continue
        model = fsdp(Net(torch.float64), reshard_after_forward=reshard)
        model.set_reshard_after_backward(reshard)
        before = [full(p).detach().clone() for p in model.parameters()]
        opt = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.0), 0.1, model=model, placement=placement)
        losses = torch.tensor(train(model, opt, torch.float64, False, *shares("FSDP2"), steps=5), device=DEVICE)
        dist.all_reduce(losses)
        assert all(second > first for first, second in zip(losses[::2], losses[1::2], strict=True))
        for p, q in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(full(p).detach(), q, rtol=0, atol=1e-15)
        with torch.no_grad():  # what the next forward uses, too
            x, _ = sample(0, torch.float64)
            alone = Net(torch.float64)
            torch.testing.assert_close(model(x), alone(x), rtol=0, atol=1e-13)


@check(2)
def weights_that_stay_gathered_are_perturbed_all_the_same():
    for ascent, placement in product(("gradient", "matrix-free"), ("weights", "forward")):
        alone = trained_alone()
        model = fsdp(Net(torch.float64), reshard_after_forward=False)
        model.set_reshard_after_backward(False)
        opt = build("NuSAM", model, "SGD", ascent=ascent, placement=placement)
        for step in range(STEPS):
            train(model, opt, torch.float64, False, *shares("FSDP2"), steps=1, first=step)
            for module in model.modules():  # the loop's own duty after a step
                if isinstance(module, FSDPModule):
                    module.reshard()
        assert_same_weights(model, alone)


@check(2)
def unreduced_gradients_are_refused():
    model = ENGINES["FSDP2"][1](Net(torch.float32))
    opt = build("NuSAM", model, "SGD")
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="leave it True, and accumulate with"):
        train(model, opt, torch.float32, steps=1)


@check(2)
def what_can_not_be_served_is_refused():
    sharded = ENGINES["FSDP2"][1](Net(torch.float32))
    with pytest.raises(ValueError, match="pass the module as model="):
        nusam.NuSAM(base_optimizer("SGD", sharded), 0.1)
    with pytest.raises(NotImplementedError, match="Gaussian can't see through"):
        nusam.GaussSAM(base_optimizer("SGD", sharded), 0.1, model=sharded)
    with pytest.raises(ValueError, match="and in the forward only"):
        nusam.SAM(base_optimizer("SGD", sharded), 0.1, model=sharded, m_sam=True)
    with pytest.raises(ValueError, match="and in the forward only"):
        nusam.NuSAM(base_optimizer("SGD", sharded), 0.1, model=sharded, m_sam=True, ascent="gradient")
    with pytest.raises(RuntimeError, match="sharded parameters without the model"):
        nusam.NuSAM(base_optimizer("SGD", sharded), 0.1, model=sharded).detach()
    plain = Net(torch.float32)
    with pytest.raises(ValueError, match="m_sam=True needs model="):
        nusam.NuSAM(base_optimizer("SGD", plain), 0.1, model=plain, m_sam=True)
    opt = nusam.NuSAM(base_optimizer("SGD", plain), 0.1, model=plain, ascent="matrix-free")
    wrapped = ddp(plain)
    with pytest.raises(RuntimeError, match="pass the wrapped module as model="):
        train(wrapped, opt, torch.float32, steps=1)
    assert not plain._forward_pre_hooks
    static = ddp(Net(torch.float32), static_graph=True)
    with pytest.raises(ValueError, match="use static_graph=False"):
        nusam.NuSAM(base_optimizer("SGD", static), 0.1, model=static, m_sam=True)


@check(2)
def ddp_options():
    for options in (
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"broadcast_buffers": False},
    ):
        for ascent, accumulate in product(("gradient", "matrix-free"), (False, True)):
            m_sam = (ascent == "gradient") == accumulate and "static_graph" not in options
            try:
                if m_sam:
                    together = ddp(Net(torch.float64), **options)
                    opt = build("NuSAM", together, "SGD", ascent=ascent, m_sam=True)
                    train(together, opt, torch.float64, accumulate, *shares("DDP"))
                    assert_bit_equal_on_all_ranks(together)
                    continue
                alone = trained_alone(accumulate=accumulate)
                together = ddp(Net(torch.float64), **options)
                opt = build("NuSAM", together, "SGD", ascent=ascent)
                train(together, opt, torch.float64, accumulate, *shares("DDP"))
                assert_same_weights(together, alone)
            except Exception as error:
                raise AssertionError(f"{options} {ascent} {accumulate=} {m_sam=}: {error}") from error


@check(2)
def accumulation_under_no_sync():
    """The loop that DDP's documentation shows, with our passes inside."""
    alone = trained_alone(accumulate=True)
    for ascent in ("gradient", "matrix-free"):
        together = ddp(Net(torch.float64))
        opt = build("NuSAM", together, "SGD", ascent=ascent)
        for step in range(STEPS):
            opt.zero_grad()
            pieces = list(micro_batches(step, torch.float64, True, *shares("DDP")))
            for i, (x, y) in enumerate(pieces):
                with together.no_sync() if i + 1 < len(pieces) else nullcontext():
                    for _ in opt.passes(accumulate=True):
                        (nn.functional.cross_entropy(together(x), y) / 2).backward()
            opt.step()
        assert_same_weights(together, alone)


@check(2)
def compiled_models():
    for ascent, m_sam in (("gradient", False), ("matrix-free", False), ("matrix-free", True)):
        alone = reference_of_m_sam(2, 5) if m_sam else Net(torch.float64)
        if not m_sam:
            train(alone, build("NuSAM", alone, "SGD"), torch.float64, steps=5)
        torch._dynamo.reset()
        together = torch.compile(ddp(Net(torch.float64)), backend="aot_eager")
        opt = build("NuSAM", together, "SGD", ascent=ascent, m_sam=m_sam)
        train(together, opt, torch.float64, False, *shares("DDP"), steps=5)
        assert_same_weights(together, alone)


@check(2)
def steps_in_the_backward():
    alone, sharded = trained_alone(base="AdamW"), fsdp(Net(torch.float64))
    opt = build("NuSAM", sharded, "AdamW")
    nusam.step_in_backward(opt)
    train(sharded, opt, torch.float64, False, *shares("FSDP2"))
    assert_same_weights(sharded, alone)
    replicated = ddp(Net(torch.float64))
    with pytest.raises(ValueError, match="before DistributedDataParallel has reduced"):
        nusam.step_in_backward(build("NuSAM", replicated, "AdamW"))


class Twice(nn.Module):
    """A layer that a process uses as often as it has reason to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x, times):
        for _ in range(times):
            x = torch.tanh(self.body(x))
        return self.head(x)


@check(2)
def processes_may_use_a_layer_differently_often():
    """One process uses the layer once, the other twice: nobody waits for what the other skips."""
    alone = Twice().to(DEVICE)
    reference = build("NuSAM", alone, "SGD")
    wrapped = [("DDP", ddp(Twice().to(DEVICE))), ("FSDP2", fully_shard(Twice().to(DEVICE)))]
    others = [(model, build("NuSAM", model, "SGD", ascent="matrix-free")) for _, model in wrapped]
    for step in range(5):
        x, y = sample(step, torch.float64)
        for _ in reference.passes():
            parts = [
                nn.functional.cross_entropy(alone(a, times), b)
                for times, a, b in zip((1, 2), x.chunk(2), y.chunk(2), strict=True)
            ]
            (sum(parts) / 2).backward()
        reference.step()
        mine = dist.get_rank()
        for model, opt in others:
            for _ in opt.passes():
                nn.functional.cross_entropy(model(x.chunk(2)[mine], mine + 1), y.chunk(2)[mine]).backward()
            opt.step()
    for model, _ in others:
        assert_same_weights(model, alone)


@check(2)
def a_parameter_without_a_gradient_is_left_out():
    model = Net(torch.float64)
    model.spare = nn.Linear(3, 3, dtype=torch.float64, device=DEVICE)
    alone = trained_alone("SAM")
    sharded = ENGINES["FSDP2"][1](model)
    train(sharded, build("SAM", sharded, "SGD"), torch.float64, False, *shares("FSDP2"))
    del sharded.spare
    assert_same_weights(sharded, alone)


@check(2)
def nothing_of_an_ascent_outlives_it():
    for engine in ("DDP", "FSDP2", "TP"):
        model = ENGINES[engine][1](Net(torch.float64))
        opt = build("NuSAM", model, "SGD", ascent="matrix-free")
        x, y = sample(0, torch.float64)
        with opt.ascent():
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        gc.collect()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, LayerGradient)]
        del loss


@check(2)
def uneven_columns_of_a_tensor_parallel_head():
    mesh = init_device_mesh(DEVICE, (2,))
    models = []
    for parallel in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7)).to(DEVICE, torch.float64)
        if parallel:
            parallelize_module(model, mesh, {"2": ColwiseParallel(output_layouts=Replicate())})
        opt = build("NuSAM", model, "SGD", ascent="matrix-free", placement="forward")
        for step in range(5):
            x, y = sample(step, torch.float64)
            for _ in opt.passes():
                nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        models.append(model)
    assert_same_weights(models[1], models[0])


# ------------------------------------------------------------------------------- precision


@check(2)
def mixed_precision_policies():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = Net(torch.float32)
    reference = train(alone, build("NuSAM", alone, "SGD"), torch.float32)
    for ascent, placement in product(("gradient", "matrix-free"), ("weights", "forward")):
        model = fsdp(Net(torch.float32), mp_policy=policy)
        opt = build("NuSAM", model, "SGD", ascent=ascent, placement=placement)
        losses = torch.tensor(train(model, opt, torch.float32, False, *shares("FSDP2")), device=DEVICE)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, torch.tensor(reference, device=DEVICE), rtol=0.05, atol=0.02)


@check(2)
def bfloat16_weights_are_perturbed_in_the_forward():
    alone = Net(torch.bfloat16)
    opt = build("NuSAM", alone, "SGD", ascent="gradient")
    reference = train(alone, opt, torch.bfloat16, steps=5)
    model = ENGINES["FSDP2"][1](Net(torch.bfloat16))
    opt = build("NuSAM", model, "SGD")
    losses = torch.tensor(train(model, opt, torch.bfloat16, False, *shares("FSDP2"), steps=5), device=DEVICE)
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, torch.tensor(reference, device=DEVICE), rtol=0.05, atol=0.02)


@check(2)
def offload_to_the_cpu():
    for ascent, placement in product(("gradient", "matrix-free"), ("weights", "forward")):
        alone = trained_alone()
        model = fsdp(Net(torch.float64), offload_policy=CPUOffloadPolicy(pin_memory=False))
        opt = build("NuSAM", model, "SGD", ascent=ascent, placement=placement)
        train(model, opt, torch.float64, False, *shares("FSDP2"))
        assert_same_weights(model, alone)


@check(2)
def attention_layers_under_fsdp2():
    for ascent, placement in product(("gradient", "matrix-free"), ("weights", "forward")):
        models = []
        for wrap in (None, fully_shard):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(
                8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, device=DEVICE
            )
            model = layer if wrap is None else wrap(layer)
            opt = build("NuSAM", model, "SGD", ascent=ascent, placement=placement)
            for step in range(5):
                x = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(DEVICE)
                x = x if wrap is None else x.chunk(2)[dist.get_rank()]
                for _ in opt.passes():
                    model(x).square().mean().backward()
                opt.step()
            models.append(model)
            assert not [key for key in opt.metrics() if key.startswith("fallback")]
        assert_same_weights(models[1], models[0])


# ------------------------------------------------------------------------------- state


def goes_on_from_a_checkpoint(engine, base, **options):
    """Six steps are three, a checkpoint taken up by a new optimizer around a new model, and three more."""
    straight = ENGINES[engine][1](Net(torch.float64))
    opt = build("NuSAM", straight, base, delay=1)
    train(straight, opt, torch.float64, False, *shares(engine), steps=6)

    first = ENGINES[engine][1](Net(torch.float64))
    opt = build("NuSAM", first, base, delay=1)
    train(first, opt, torch.float64, False, *shares(engine), steps=3)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    weights, state = get_state_dict(first, opt, options=StateDictOptions(**options))
    dcp.save({"model": weights, "opt": state}, checkpoint_id=folder[0])

    second = ENGINES[engine][1](Net(torch.float64))
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    opt = build("NuSAM", second, base, delay=1)
    weights, state = get_state_dict(second, opt, options=StateDictOptions(**options))
    dcp.load({"model": weights, "opt": state}, checkpoint_id=folder[0])
    set_state_dict(second, opt, model_state_dict=weights, optim_state_dict=state, options=StateDictOptions(**options))
    train(second, opt, torch.float64, False, *shares(engine), steps=3, first=3)
    assert_same_weights(second, straight_full(straight), tolerance=0)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def straight_full(model):
    """Its full weights, in a module of one process."""
    alone = Net(torch.float64)
    with torch.no_grad():
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            p.copy_(full(q))
    return alone


for engine, base, options in (
    ("FSDP2", "AdamW", {}),
    ("FSDP2", "SGD", {}),
    ("FSDP2", "plain SGD", {}),
    ("FSDP2", "AdamW", {"cpu_offload": True}),
    ("DDP", "AdamW", {}),
    ("TP", "AdamW", {}),
):
    CHECKS[2][f"goes on from a checkpoint: {engine} {base} {options}"] = partial(
        goes_on_from_a_checkpoint, engine, base, **options
    )
for engine in ("FSDP+TP", "HSDP"):
    CHECKS[4][f"goes on from a checkpoint: {engine}"] = partial(goes_on_from_a_checkpoint, engine, "AdamW")


@check(2)
def state_is_known_by_the_names_of_the_model():
    for engine in ("DDP", "FSDP2"):
        model = ENGINES[engine][1](Net(torch.float64))
        opt = build("NuSAM", model, "AdamW")
        train(model, opt, torch.float64, False, *shares(engine), steps=2)
        _, state = get_state_dict(model, opt)
        u = state["state"]["up.weight"]["nusam_u"]
        assert u.shape == (8,)
        assert not hasattr(u, "device_mesh")
        ours = {f"sigma/{name}" for name, p in Net(torch.float64).named_parameters() if p.ndim == 2}
        assert ours <= opt.metrics().keys()
        first = u.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, u)


@check(2)
def a_flattened_state_that_lost_our_entries_is_refused():
    model = ENGINES["FSDP2"][1](Net(torch.float64))
    opt = build("NuSAM", model, "AdamW")
    train(model, opt, torch.float64, False, *shares("FSDP2"), steps=2)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, opt, options=flat)
    with pytest.raises(ValueError, match="has lost nusam's own entries"):
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=flat)


# ------------------------------------------------------------------------------- the support matrix

SUPPORT = {  # number of processes → how they work together → how to wrap, what splits the batch, arguments
    2: {
        "single": (lambda model: model, "TP", {}),
        "DDP": (ddp, "DDP", {}),
        "DDP m-SAM": (ddp, "DDP", {"m_sam": True}),
        "FSDP2": (fsdp, "FSDP2", {}),
        "TP": (ENGINES["TP"][1], "TP", {}),
        "CPU offload": (partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)), "FSDP2", {}),
    },
    4: {
        "FSDP+TP": (ENGINES["FSDP+TP"][1], "FSDP+TP", {}),
        "HSDP": (ENGINES["HSDP"][1], "HSDP", {}),
    },
}


def attempt(wrap, split, method, options):
    """Yes, if three steps come out as in one process (or, for m-SAM, the same on all); else what was said."""
    model = wrap(Net(torch.float64))
    base = base_optimizer("SGD", model)
    try:
        opt = EVERY_METHOD[method](base, 0.1, model=model, **options)
        train(model, opt, torch.float64, False, *shares(split), steps=3)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
    if options.get("m_sam"):
        assert_bit_equal_on_all_ranks(model)
        return "yes"
    assert_same_weights(model, trained_alone(method, steps=3))
    return "yes"


@check(2, 4)
def support():
    return {
        f"{method}/{ascent}/{placement}": {
            engine: attempt(wrap, split, method, {**options, "ascent": ascent, "placement": placement})
            for engine, (wrap, split, options) in SUPPORT[dist.get_world_size()].items()
        }
        for method, ascent, placement in product(EVERY_METHOD, ("gradient", "matrix-free"), ("weights", "forward"))
    }
