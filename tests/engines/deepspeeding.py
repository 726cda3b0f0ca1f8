"""What two processes say of a perturbation under DeepSpeed; ``python -m tests.engines.deepspeeding said.json``."""

import copy
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.nn import functional as F

import nusam

STEPS, RHO, BATCH = 20, 0.1, 16
CASES = {  # ZeRO's stage, micro-batches of a step, dtype, offload
    "ZeRO 0": (0, 1, "float32", False),
    "ZeRO 0, accumulation": (0, 2, "float32", False),
    "ZeRO 1, accumulation": (1, 2, "float32", False),
    "ZeRO 2, accumulation, offload": (2, 2, "float32", True),
    "ZeRO 3": (3, 1, "float32", False),
    "ZeRO 3, accumulation, offload": (3, 2, "float32", True),
    "ZeRO 2, bfloat16": (2, 1, "bfloat16", False),
    "ZeRO 3, bfloat16": (3, 1, "bfloat16", False),
}


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 64), nn.Tanh(), nn.Linear(64, 4)]
    return nn.Sequential(*layers)


def sample(index: int):
    """The joint micro-batch."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(BATCH, 6, generator=generator), torch.randint(0, 4, (BATCH,), generator=generator)


def part(index: int):
    """The share of it that is this process's."""
    size = BATCH // dist.get_world_size()
    here = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return [rows[here] for rows in sample(index)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def configured(case):
    """DeepSpeed's configuration."""
    stage, micro_batches, dtype, offload = case
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage == 3 and micro_batches > 1:  # weights go as soon as their layer is through
        zero |= dict.fromkeys(
            ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0
        )
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu"}} | ({"offload_param": {"device": "cpu"}} if stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told otherwise
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def engine_of(case):
    model = net()
    return deepspeed.initialize(model=model, optimizer=sgd(model), config=configured(case))[0]


COUNTED = ("all_reduce", "reduce", "broadcast", "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single")


@contextmanager
def counting(calls: Counter):
    """Count the collectives that add something up or hand it on, gathers of weights apart."""
    before = {name: getattr(dist, name) for name in COUNTED}

    def counted(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return before[name](*args, **kwargs)

        return call

    try:
        for name in COUNTED:
            setattr(dist, name, counted(name))
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def train(engine, perturbation, case, steps, faults, calls):
    _, micro_batches, dtype, _ = case
    for step in steps:
        for i in range(micro_batches):
            x, y = part(step * micro_batches + i)
            x = x.to(getattr(torch, dtype))
            before = Counter(calls)
            for number, (xs, ys) in enumerate(perturbation.passes(x, y, ends_step=i == micro_batches - 1)):
                if number == 1 and step not in (0, 1, 2, 4, 8, 16):  # where it compares, it adds up what it compares
                    faults += [f"step {step}: {calls - before}"] if calls - before != {"all_reduce": 2} else []
                gradients = [p.grad for p in engine.module.parameters()]
                begun = Counter(calls)
                engine.backward(F.cross_entropy(engine(xs).float(), ys))
                if number == 0:
                    same = all(p.grad is g for p, g in zip(engine.module.parameters(), gradients, strict=True))
                    faults += [] if same else [f"step {step}: the ascent has left a gradient"]
                    added = calls - begun if step else None  # ZeRO 3 compares its order of modules once
                    faults += [f"step {step}: the ascent's {added}"] if added else []
            engine.step()


def weights(engine):
    parameters = list(engine.module.parameters())
    gathered = deepspeed.zero.GatheredParameters(parameters) if hasattr(parameters[0], "ds_id") else nullcontext()
    with gathered:
        return [p.detach().float().clone() for p in parameters]


def alone(case, rho=RHO):
    """The same on the joint batch, in one process; weights below float32 have copies in float32 that are stepped."""
    _, micro_batches, dtype, _ = case
    masters = net()
    model = copy.deepcopy(masters).to(getattr(torch, dtype))
    step_of = sgd(masters)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho, model=model, ascent="gradient")
    for step in range(STEPS):
        opt.zero_grad()
        for i in range(micro_batches):
            x, y = sample(step * micro_batches + i)
            for xs, ys in opt.passes(x.to(getattr(torch, dtype)), y, accumulate=True):
                (F.cross_entropy(model(xs).float(), ys) / micro_batches).backward()
        opt.step()
        with torch.no_grad():
            for master, p in zip(masters.parameters(), model.parameters(), strict=True):
                master.grad = p.grad.float()
            step_of.step()
            for master, p in zip(masters.parameters(), model.parameters(), strict=True):
                p.copy_(master)
    return [p.detach().float() for p in model.parameters()]


def distance(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def said_of(case, folder):
    faults, calls = [], Counter()
    engine = engine_of(case)
    perturbation = nusam.Perturbation(engine, RHO)
    with counting(calls):
        train(engine, perturbation, case, range(9), faults, calls)
    engine.save_checkpoint(folder, client_state={"nusam": perturbation.state_dict()})
    with counting(calls):
        train(engine, perturbation, case, range(9, STEPS), faults, calls)
    found = weights(engine)
    resumed = engine_of(case)
    perturbation = nusam.Perturbation(resumed, RHO)
    _, client_state = resumed.load_checkpoint(folder)
    perturbation.load_state_dict(client_state["nusam"])
    train(resumed, perturbation, case, range(9, STEPS), [], Counter())
    try:
        opt = nusam.NuSAM(sgd(resumed.module), RHO, model=resumed.module)
        next(iter(opt.passes()))
        refused = "nothing"
    except (NotImplementedError, ValueError) as error:
        refused = str(error)
    try:
        next(iter(nusam.Perturbation(resumed.module, RHO).passes()))
        refused_inside = "nothing"
    except RuntimeError as error:
        refused_inside = str(error)
    return {
        "off": distance(found, alone(case)),
        "without off": distance(found, alone(case, 0.0)),
        "resumed off": distance(found, weights(resumed)),
        "faults": faults[:3],
        "refused": [refused, refused_inside],
        "epsilon": perturbation.metrics()["epsilon/0.weight"],
    }


def large(convolves=False) -> nn.Module:
    """A matrix of more entries than are added up before a layer multiplies."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 4)]
    kernel = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*(kernel if convolves else []), *layers)


def gradients_off(stage, dtype, frozen, convolves, persistent) -> dict:
    """Of each parameter's gradient at the perturbed weights, against float64 by hand, by its norm."""
    dtype = getattr(torch, dtype)
    model = large(convolves).to(dtype)
    if frozen:
        model[2].requires_grad_(False)
    model_by_hand = copy.deepcopy(model).double().requires_grad_()
    x, y = sample(0)
    parameters = dict(model_by_hand.named_parameters())

    def gradients():
        loss = F.cross_entropy(model_by_hand(x.to(dtype).double()), y)
        return torch.autograd.grad(loss, parameters.values())

    found = gradients()
    with torch.no_grad():
        for (name, p), gradient in zip(parameters.items(), found, strict=True):
            if p.ndim > 1 and (not frozen or name.startswith("2")):
                U, _, Vh = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
                p += torch.outer(U[:, 0], Vh[0]).view(p.shape)
    expected = dict(zip(parameters, gradients(), strict=True))
    config = configured((stage, 1, str(dtype).split(".")[1], False))
    if persistent:
        del config["zero_optimization"]["stage3_param_persistence_threshold"]
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)[0]
    options = {"targets": lambda name, _: name.startswith("2")} if frozen else {}
    perturbation = nusam.Perturbation(engine, 1.0, power_iterations=100, convolutions=convolves, **options)
    x, y = part(0)
    for step in range(3):
        if step:
            engine.step()
        for xs, ys in perturbation.passes(x.to(dtype), y):
            engine.backward(F.cross_entropy(engine(xs).float(), ys))
    reduced = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    off = {n: float((g.double() - expected[n]).norm() / expected[n].norm()) for n, g in reduced.items()}
    return {"off": max(off.values()), "perturbed": sorted(k for k in perturbation.metrics() if "epsilon" in k)}


GRADIENTS = {  # ZeRO's stage, dtype, whether a layer is frozen, whether there is a kernel, whether weights stay
    "ZeRO 2": (2, "float32", False, False, False),
    "ZeRO 3": (3, "float32", False, False, False),
    "ZeRO 3, bfloat16": (3, "bfloat16", False, False, False),
    "ZeRO 3, a frozen layer": (3, "float32", True, False, False),
    "ZeRO 2, a kernel": (2, "float32", False, True, False),
    "ZeRO 3, a kernel": (3, "float32", False, True, False),
    "ZeRO 3, a kernel that stays": (3, "float32", False, True, True),
}


def steps_with_a_scaler() -> dict:
    """A loss scale from which gradients overflow at first."""
    fp16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 100, "hysteresis": 1}
    config = {**configured((2, 1, "float32", False)), "fp16": fp16}
    model = net()
    engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)[0]
    perturbation, perturbed, counted = nusam.Perturbation(engine, RHO, delay=3), [], []
    for step in range(14):
        x, y = part(step)
        perturbed.append(perturbation.active)
        for xs, ys in perturbation.passes(x.half(), y):
            engine.backward(F.cross_entropy(engine(xs).float(), ys))
        engine.step()
        counted.append(step + 1 - engine.skipped_steps == perturbation.state_dict()["steps"])
    return {"skipped": engine.skipped_steps, "unperturbed": perturbed.index(True), "counted": all(counted)}


class Fused(torch.autograd.Function):
    """A head and its loss, whose backward asks the parameter what an engine has noted on it."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, D):
        x, W = ctx.saved_tensors
        return D @ W, (D.T @ x if W.ds_status else None)


class WithFusedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = net(), nn.Linear(4, 4)

    def forward(self, x):
        with deepspeed.zero.GatheredParameters([self.head.weight]):
            return Fused.apply(self.body(x), self.head.weight)


def refused_of(ask) -> str:
    try:
        ask()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


def refusals() -> dict:
    """What is said of what can't be had, by case."""
    x, y = part(0)

    def step_handed_over(stage, known):
        model = net()
        opt = nusam.NuSAM(sgd(model), RHO, **({"model": model} if known else {}))
        engine = deepspeed.initialize(model=model, optimizer=opt, config=configured((stage, 1, "float32", False)))[0]
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()

    def use_beside_its_layer():
        model = WithFusedHead()
        engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=configured(CASES["ZeRO 3"]))[0]
        for xs, ys in nusam.Perturbation(engine, RHO).passes(x, y):
            engine.backward(F.cross_entropy(engine(xs), ys))

    def compiled(stage, late):
        engine = engine_of((stage, 1, "float32", False))
        perturbation = nusam.Perturbation(engine, RHO) if late else None
        engine.compile(backend="eager") if late else engine.module[3].compile(backend="eager")
        perturbation = perturbation or nusam.Perturbation(engine, RHO)
        next(perturbation.passes(x, y))

    def step_inside_the_passes(stage, accumulation, delay):
        engine = engine_of((stage, accumulation, "float32", False))
        for xs, ys in nusam.Perturbation(engine, RHO, delay=delay).passes(x, y):
            engine.backward(F.cross_entropy(engine(xs), ys))
            engine.step()

    steps = {
        f"a step inside, ZeRO {stage}, {accumulation}, delay {delay}": refused_of(
            lambda stage=stage, accumulation=accumulation, delay=delay: step_inside_the_passes(
                stage, accumulation, delay
            )
        )
        for stage in (0, 2, 3)
        for accumulation in (1, 2)
        for delay in (0, 5)
    }
    compiles = {
        f"compiled, ZeRO {stage}{', late' if late else ''}": refused_of(
            lambda stage=stage, late=late: compiled(stage, late)
        )
        for stage in (0, 2, 3)
        for late in (False, True)
    }
    handed_over = {
        f"a step of NuSAM's own, ZeRO {stage}{', with its model' if known else ''}": refused_of(
            lambda stage=stage, known=known: step_handed_over(stage, known)
        )
        for stage in (0, 2, 3)
        for known in (False, True)
    }
    return {**handed_over, **compiles, **steps, "a fused head": refused_of(use_beside_its_layer)}


def run_the_page(folder) -> int:
    """The recipe of docs/deepspeed.md; the steps that it took."""
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text("utf-8")
    (recipe,) = re.findall(r'```py title="DeepSpeed"\n(.*?)```', page, flags=re.DOTALL)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    model = net()

    class Initialized:
        """DeepSpeed, with an optimizer that needs no compiler."""

        @staticmethod
        def initialize(model, model_parameters, config):
            return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model_parameters, lr=0.1), config=config)

    names = {
        "deepspeed": Initialized,
        "nusam": nusam,
        "model": model,
        "config": config,
        "loader": [sample(i) for i in range(6)],
        "criterion": F.cross_entropy,
        "folder": folder,
    }
    exec(compile(recipe, "docs/deepspeed.md", "exec"), names)
    return names["perturbation"].state_dict()["steps"]


def said(folder) -> dict:
    return {
        "cases": {name: copy.deepcopy(said_of(case, f"{folder}/{i}")) for i, (name, case) in enumerate(CASES.items())},
        "gradients": {name: gradients_off(*case) for name, case in GRADIENTS.items()},
        "refusals": refusals(),
        "scaled": steps_with_a_scaler(),
        "steps of the page": run_the_page(f"{folder}/page"),
    }


def in_processes(what, path: str) -> None:
    """Write down what the first process says, which is given a folder that all share."""
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    deepspeed.init_distributed(dist_backend="gloo")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        found = what(shared[0])
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(found), "utf-8")
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    in_processes(said, sys.argv[1])
