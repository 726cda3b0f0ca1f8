"""Parameters that a process has for itself beside those that it shares, and groups that are not all processes."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nusam
from tests.distributed import oracle
from tests.distributed.engines import DEVICE, full
from tests.distributed.problem import BALLS, ITERATIONS, RATE, RHO, STEPS, Net, built, sample
from tests.distributed.running import Checks, check

CHECKS: Checks = {2: {}, 4: {}}
WAYS = (("gradient", "weights"), ("matrix-free", "weights"), ("matrix-free", "forward"), ("gradient", "forward"))
METHODS = (nusam.NuSAMNorm, nusam.SAM, nusam.GaussSAM, nusam.GSAM)


def sgd(parameters, rate=RATE):
    return torch.optim.SGD(parameters, lr=rate)


# ------------------------------------------------------------------------------- heads of their own


class Headed(nn.Module):
    """A body, and a head for each of the processes that are asked for."""

    def __init__(self, sizes, heads=(0, 1)) -> None:
        super().__init__()
        self.body = Net()
        self.heads = nn.ModuleDict({str(k): nn.Linear(3, sizes[k]) for k in (0, 1)})
        for k in {0, 1} - {*heads}:
            del self.heads[str(k)]

    def forward(self, x, process):
        return self.heads[str(process)](self.body(x))


def headed_backward(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x, process), y).backward()


def around_the_body(model):
    model.body = DistributedDataParallel(model.body)
    return model


def told_to_ignore(model):
    names = [name for name, _ in model.named_parameters() if name.startswith("heads")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def sharded_body(model):
    fully_shard(model.body)
    return model


def sharded_without_heads(model):
    return fully_shard(model, ignored_params=set(model.heads.parameters()))


WRAPS = {f.__name__: f for f in (around_the_body, told_to_ignore, sharded_body, sharded_without_heads)}


def assert_trains_to(expected, model, opt):
    """Train, each process by its own head; then every weight is that of the loop by hand."""
    for step in range(STEPS):
        for _ in opt.passes():
            headed_backward(model, step, dist.get_rank())
        opt.step()
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full(parameter), theirs[name.replace("module.", "")], rtol=0, atol=1e-6)


def own_heads(wrap, sizes, ascent, placement):
    """A head is perturbed, and trained, by the gradient of its process, the body by the mean."""
    expected = built(partial(Headed, sizes))
    for step in range(STEPS):
        backward = partial(lambda model, process, step: headed_backward(model, step, process), step=step)
        gradients = oracle.at_epsilon(expected, backward, oracle.nu_sam, RHO, 2)
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= RATE * gradients[name] * (2 if name.startswith("heads") else 1)
    me = dist.get_rank()
    model = WRAPS[wrap](built(partial(Headed, sizes, heads=(me,))))
    opt = nusam.NuSAM(
        sgd(model.parameters()), RHO, power_iterations=ITERATIONS, model=model, ascent=ascent, placement=placement
    )
    assert_trains_to(expected, model, opt)


for wrap in WRAPS:
    for number, way in enumerate(WAYS):
        sizes = (3, 3) if number % 2 else (4, 7)
        CHECKS[2][f"own heads {wrap} {sizes} {way}"] = partial(own_heads, wrap, sizes, *way)


def served_in_one_process(wrap):
    """A head that is large in one process alone does not decide what all do."""
    model = WRAPS[wrap](built(partial(Headed, (300, 3), heads=(dist.get_rank(),))))
    opt = nusam.NuSAM(sgd(model.parameters()), RHO, model=model)
    opt._ascent.serve_from = 200
    for step in range(2):
        for _ in opt.passes():
            headed_backward(model, step, dist.get_rank())
        opt.step()
    body = [full(parameter).detach() for name, parameter in model.named_parameters() if "heads" not in name]
    flat = torch.cat([parameter.reshape(-1) for parameter in body])
    both = [torch.empty_like(flat), torch.empty_like(flat)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


for wrap in WRAPS:
    CHECKS[2][f"a large head in one process {wrap}"] = partial(served_in_one_process, wrap)


def own_radii(wrap, ball):
    """With a perturbation of its own, a process has a radius for all that it sees."""
    method, epsilons = BALLS[ball]
    expected = built(partial(Headed, (4, 7)))
    for step in range(STEPS):
        backwards = [partial(lambda model, _, k, step: headed_backward(model, step, k), k=k, step=step) for k in (0, 1)]
        found = [oracle.at_epsilon(expected, backward, epsilons, RHO, 1) for backward in backwards]
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                summed = sum(gradients.get(name, 0) for gradients in found)
                parameter -= RATE * summed / (1 if name.startswith("heads") else 2)
    me = dist.get_rank()
    model = WRAPS[wrap](built(partial(Headed, (4, 7), heads=(me,))))
    opt = method(sgd(model.parameters()), RHO, model=model, m_sam=True)
    assert_trains_to(expected, model, opt)


for wrap in ("around_the_body", "told_to_ignore"):
    for ball in ("NuSAMNorm", "SAM"):
        CHECKS[2][f"own heads with radii of their own {wrap} {ball}"] = partial(own_radii, wrap, ball)


def share_no_radius(wrap):
    """Whose processes would know different parts of its norm."""
    me = dist.get_rank()
    for method in METHODS:
        model = WRAPS[wrap](built(partial(Headed, (3, 3), heads=(me,))))
        if wrap.startswith("sharded") and method is nusam.GaussSAM:
            continue  # refused for another reason
        for shown in (None, model) if wrap == "around_the_body" else (model,):
            with pytest.raises(NotImplementedError, match=r"outside of what .* let the wrapper hold it, or use NuSAM"):
                method(sgd(model.parameters()), RHO, model=shown)
        plain = built(partial(Headed, (3, 3), heads=(me,)))
        opt = method(sgd(plain.parameters()), RHO, model=plain)
        WRAPS[wrap](plain)  # late
        if wrap == "around_the_body":
            with pytest.raises(NotImplementedError, match="outside of what"):
                next(iter(opt.passes()))
            assert all(parameter.grad is None for parameter in plain.parameters())


for wrap in WRAPS:
    CHECKS[2][f"own heads share no radius {wrap}"] = partial(share_no_radius, wrap)


@check(2, among=CHECKS)
def frozen_matrices_that_no_wrapper_holds_are_refused():
    model = built(partial(Headed, (3, 3), heads=(dist.get_rank(),)))
    model.heads.requires_grad_(False)
    model = told_to_ignore(model)
    with pytest.raises(NotImplementedError, match="is frozen and outside of what"):
        nusam.NuSAM(sgd(model.module.body.parameters()), RHO, model=model, targets="frozen")
    nusam.NuSAM(sgd(model.module.body.parameters()), RHO, model=model, targets="frozen", m_sam=True)


@check(2, among=CHECKS)
def one_pass_leaves_own_heads_to_two_passes():
    """Also where one process alone has some."""
    me = dist.get_rank()
    model = around_the_body(built(partial(Headed, (3, 3), heads=(me,))))
    model.heads.requires_grad_(me == 1)
    opt = nusam.NuSAM(sgd(p for p in model.parameters() if p.requires_grad), RHO, model=model)
    batches = [sample(step, me) for step in range(4)]
    steps = opt.one_pass(batches, lambda batch: F.cross_entropy(model(batch[0], me), batch[1]))
    with pytest.warns(UserWarning, match="has matrices of one process alone"):
        next(steps)
    opt.step()
    for _ in steps:
        opt.step()


# ------------------------------------------------------------------------------- groups of their own


def trained_alone(wrap, mine):
    """Processes that share nothing may take different numbers of steps, and talk among themselves."""
    mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("member", "batch"))
    me = mesh.get_local_rank("member")
    model = built(Net)
    if wrap == "DDP":
        model = DistributedDataParallel(model, process_group=mesh["batch"].get_group())
    else:
        fully_shard(model, mesh=mesh["batch"])
    opt = nusam.NuSAM(sgd(model.parameters()), RHO, model=model)
    batches = [sample(step, me) for step in range(mine[me])]
    for _ in opt.one_pass(batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1])):
        opt.step()
    told = torch.tensor(2.0**me, device=DEVICE)
    dist.all_reduce(told)
    assert told == 3 * (dist.get_world_size() // 2)  # and meets nothing of ours


for wrap in ("DDP", "FSDP2"):
    for mine in ((4, 4), (4, 2), (4, 0)):
        for processes in CHECKS:
            CHECKS[processes][f"one_pass in a group of its own {wrap} {mine}"] = partial(trained_alone, wrap, mine)


# ------------------------------------------------------------------------------- sums that are scaled otherwise


def net_backward(model, step, process):
    x, y = sample(step, process)
    F.cross_entropy(model(x), y).backward()


def divided_otherwise(ball, divisors, options):
    """FSDP2's gradients are those of the mean times a factor of each group: here 2 divided by its divisor."""
    method, epsilons = BALLS[ball]
    factors = {name: 2 / divisors["blocks" in name] for name, _ in Net().named_parameters()}
    expected = built(Net)
    each = options.get("m_sam", False)

    def scaled(gradients, rho):
        return epsilons({name: G * factors[name] for name, G in gradients.items()}, rho)

    for step in range(STEPS):
        backward = partial(lambda model, process, step: net_backward(model, step, process), step=step)
        passes = [partial(lambda model, _, k, run: run(model, k), k=k, run=backward) for k in (0, 1)]
        found = [oracle.at_epsilon(expected, one, scaled, RHO, 1) for one in passes] if each else []
        found = found or [oracle.at_epsilon(expected, backward, scaled, RHO, 2)]
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= RATE * factors[name] * sum(g[name] for g in found) / len(found)
    model = built(Net)
    for part in (*model.blocks, model):
        fully_shard(part)
        part.set_gradient_divide_factor(divisors[part is not model])
    opt = method(sgd(model.parameters()), RHO, model=model, **options)
    if options.get("ascent") == "auto":
        opt._ascent.serve_from = 40  # some of the matrices
    for step in range(STEPS):
        for _ in opt.passes():
            net_backward(model, step, dist.get_rank())
        opt.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), q, rtol=0, atol=1e-6)


if hasattr(torch.distributed.fsdp.FSDPModule, "set_gradient_divide_factor"):
    for number, divisors in enumerate(((1.0, 1.0), (1.0, 4.0))):
        for ball in ("NuSAM", "NuSAMNorm"):
            for options in ({"placement": "forward"}, {"ascent": "matrix-free"}, {"ascent": "auto"}, {"m_sam": True}):
                if not (number and "m_sam" in options):  # whose radius is of what a process sees, before it is scaled
                    CHECKS[2][f"divided {divisors} {ball} {options}"] = partial(
                        divided_otherwise, ball, divisors, options
                    )


# ------------------------------------------------------------------------------- replicate()


def composed(ball, options):
    method, epsilons = BALLS[ball]
    expected = built(Net)
    oracle.train(expected, net_backward, epsilons, RHO, RATE, STEPS, 2)
    model = replicate(built(Net))
    opt = method(sgd(model.parameters()), RHO, model=model, **options)
    for step in range(STEPS):
        for _ in opt.passes():
            net_backward(model, step, dist.get_rank())
        opt.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


for ball in BALLS:
    for options in ({}, {"ascent": "matrix-free"}) if ball != "SAM" else ({},):
        CHECKS[2][f"replicate() {ball} {options}"] = partial(composed, ball, options)


@check(2, among=CHECKS)
def replicate_has_no_m_sam_and_no_gradients_kept_back():
    model = replicate(built(Net))
    with pytest.raises(ValueError, match=r"m_sam .* but replicate\(\) makes DDP reduce every gradient"):
        nusam.NuSAM(sgd(model.parameters()), RHO, model=model, m_sam=True)
    opt = nusam.NuSAM(sgd(model.parameters()), RHO, model=model)
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="leave it True"):
        next(iter(opt.passes()))


@check(2, among=CHECKS)
def what_refuses_an_unknown_replicate_leaves_nothing_behind():
    model = replicate(nn.Sequential(built(Net)))
    opt = nusam.NuSAM(sgd(model.parameters()), RHO, model=model[0], ascent="matrix-free")
    with pytest.raises(RuntimeError, match="pass the wrapped module as model="):
        for _ in opt.passes():
            net_backward(model, 0, dist.get_rank())
    assert DistributedDataParallel._active_ddp_module is None


# ------------------------------------------------------------------------------- DDP around tensor parallelism


@check(2, among=CHECKS)
def ddp_that_takes_tensor_parallel_parameters_apart_is_refused():
    mesh = init_device_mesh(DEVICE, (1, 2), mesh_dim_names=("dp", "tp"))
    inner = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(3, 3)).to(DEVICE)
    parallelize_module(inner, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    model = DistributedDataParallel(inner, device_mesh=mesh["dp"])
    for method in (nusam.NuSAM, *METHODS):
        for shown in (None, model):
            with pytest.raises(NotImplementedError, match="use fully_shard around tensor parallelism"):
                method(sgd(model.parameters()), RHO, model=shown)
    nusam.NuSAM(sgd(inner[2].parameters()), RHO, model=model)  # a layer that is none
