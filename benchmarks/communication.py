"""Bytes and collectives of a step under DDP, FSDP2 and tensor parallelism, and what they cost at scale.

``python benchmarks/communication.py``

Counted in two processes for a small model; the formulas that agree with the counts are then applied to the shapes of
real models on the meta device.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import timm
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import nusam
from collectives import Collectives
from recording import record

# Of the projection: an H100-like device, eight to a node.
FLOPS = 400e12  # achieved per second in bfloat16
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and device, within a node and between nodes
LATENCY = 10e-6  # seconds a message
DEVICES = (8, 64, 1024)


@dataclass(frozen=True)
class Method:
    """How an optimizer runs its passes."""

    name: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    passes: int = 2
    reduces_ascent: bool = True  # are weight gradients formed, and reduced, in the ascent?
    sums: Callable[[nn.Module], int] = lambda model: 0  # bytes that the ascent sums over the processes itself
    share: float = 1.0  # of the batch in the ascent
    rides: bool = False  # in the descent of the step before

    def work(self) -> float:
        """Forwards' worth of a step: three for forward and backward, two for an ascent that forms no gradient."""
        descent_only = self.name == "AdamW"
        return 3 + (0 if descent_only else (3 if "by gradients" in self.name or self.name == "SAM" else 2) * self.share)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def vectors(model: nn.Module) -> int:
    """Of u and v of every matrix, in float32."""
    return 4 * sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)


def norms(model: nn.Module) -> int:
    """Of the largest entry and the norm of every parameter."""
    return 8 * len(list(model.parameters()))


def nusam_by(ascent: str, m_sam: bool = False, share: float = 1.0) -> Callable[[nn.Module], nusam.SharpnessAware]:
    return lambda model: nusam.NuSAM(adamw(model), 0.05, model=model, ascent=ascent, m_sam=m_sam, ascent_share=share)


def cheaper(m_sam: bool = False) -> list[Method]:
    """νSAM, or m-SAM, with an eighth of the batch in the ascent, in two passes and in one."""
    name, sums = ("m-SAM", lambda model: 0) if m_sam else ("νSAM", vectors)
    make = nusam_by("matrix-free", m_sam, 1 / 8)
    return [
        Method(f"{name} at 1/8", make, reduces_ascent=False, sums=sums, share=1 / 8),
        Method(f"{name} at 1/8, one pass", make, passes=1, reduces_ascent=False, sums=sums, share=1 / 8, rides=True),
    ]


def sam(model: nn.Module) -> nusam.SharpnessAware:
    return nusam.SAM(adamw(model), 0.05, model=model)


METHODS = {
    "DDP": [
        Method("AdamW", adamw, passes=1),
        Method("SAM", sam),
        Method("νSAM by gradients", nusam_by("gradient")),
        Method("νSAM matrix-free", nusam_by("matrix-free"), reduces_ascent=False, sums=vectors),
        Method("m-SAM by gradients", nusam_by("gradient", m_sam=True), reduces_ascent=False),
        Method("m-SAM matrix-free", nusam_by("matrix-free", m_sam=True), reduces_ascent=False),
        *cheaper(),
        *cheaper(m_sam=True),
    ],
    "FSDP2": [
        Method("AdamW", adamw, passes=1),
        Method("SAM", sam, sums=norms),
        Method("νSAM by gradients", nusam_by("gradient"), sums=vectors),
        Method("νSAM matrix-free", nusam_by("matrix-free"), reduces_ascent=False, sums=vectors),
        Method("m-SAM matrix-free", nusam_by("matrix-free", m_sam=True), reduces_ascent=False),
        *cheaper(),
        *cheaper(m_sam=True),
    ],
    "TP": [
        Method("AdamW", adamw, passes=1),
        Method("SAM", sam),
        Method("νSAM by gradients", nusam_by("gradient")),
        Method("νSAM matrix-free", nusam_by("matrix-free")),
    ],
}


# ------------------------------------------------------------------------------- formulas


def gradient_bytes(model: nn.Module, size: int) -> int:
    return size * sum(p.numel() for p in model.parameters())


def expected(engine: str, method: Method, model: nn.Module, size: int = 4) -> dict[str, int]:
    """Bytes of a step by kind of collective; a gather or scatter counts the whole tensor.

    DDP all-reduces every gradient once a backward. FSDP2 gathers the weights for the forward and again for the
    backward, where it scatters the gradients.
    """
    everything = gradient_bytes(model, size)
    backwards = method.passes if method.reduces_ascent else 1
    sums = method.sums(model)
    if engine == "DDP":
        return {"all-reduce": backwards * everything + sums, "all-gather": 0, "reduce-scatter": 0}
    return {
        "all-reduce": sums,
        "all-gather": 2 * method.passes * everything,
        "reduce-scatter": backwards * everything,
    }


def seconds(kind: str, size: int, devices: int, calls: int) -> float:
    """A ring within and between nodes: (p−1)/p of the bytes once (gather, scatter) or twice (all-reduce)."""
    rounds = 2 if kind == "all-reduce" else 1
    bandwidth = NVLINK if devices <= 8 else NETWORK
    return rounds * (devices - 1) / devices * size / bandwidth + calls * rounds * devices.bit_length() * LATENCY


# ------------------------------------------------------------------------------- counted


class Small(nn.Module):
    """Two blocks of two bias-free layers, which split evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32, bias=False), nn.GELU(), nn.Linear(32, 16, bias=False)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def wrapped(engine: str, model: Small) -> nn.Module:
    if engine == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        if engine == "TP":
            parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        else:
            fully_shard(block, mesh=mesh)
    return model if engine == "TP" else fully_shard(model, mesh=mesh)


def one_step(model: nn.Module, opt: torch.optim.Optimizer, rides: bool) -> Collectives:
    """What a step says, of several: engines settle in the first, and the comparisons of νSAM come in the first two."""

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    steps = iter([])
    if rides:
        steps = cast(nusam.NuSAM, opt).one_pass((torch.randn(8, 16) for _ in range(9)), loss)
    for _ in range(4):
        with Collectives() as collectives:
            if rides:
                next(steps)
            elif isinstance(opt, nusam.SharpnessAware):
                for x in opt.passes(torch.randn(8, 16)):
                    loss(x).backward()
            else:
                opt.zero_grad()
                loss(torch.randn(8, 16)).backward()
            opt.step()
    return collectives


def counted() -> list[dict[str, object]]:
    """A row for every engine and method, checked against the formulas."""
    rows: list[dict[str, object]] = []
    for engine, methods in METHODS.items():
        for method in methods:
            model = wrapped(engine, Small())
            opt = method.make(model)
            collectives = one_step(model, opt, method.rides)
            kinds = {"all-reduce": "allreduce", "all-gather": "allgather", "reduce-scatter": "reducescatter"}
            measured = {kind: collectives.bytes(name) for kind, name in kinds.items()}
            row: dict[str, object] = {"engine": engine, "method": method.name, "collectives": collectives.count()}
            rows.append(row | {f"{kind}, bytes": size for kind, size in measured.items()})
            if engine != "TP":
                assert measured == expected(engine, method, Small()), (engine, method.name, measured)
    return rows


# ------------------------------------------------------------------------------- projected


def shapes() -> dict[str, tuple[nn.Module, int, float]]:
    """Model on the meta device, modules that an engine wraps, and floating-point operations of a forward a device."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    tokens = {"ViT-B/16": 128 * 197, "LLaMA-7B shape": 4096}
    return {
        name: (model, wraps, 2.0 * tokens[name] * sum(p.numel() for p in model.parameters()))
        for name, model, wraps in (("ViT-B/16", vit, 12), ("LLaMA-7B shape", llama, 32))
    }


def projected() -> list[dict[str, object]]:
    rows = []
    for name, (model, wraps, forward) in shapes().items():
        for engine in ("DDP", "FSDP2"):
            for method in METHODS[engine]:
                size = 4 if engine == "DDP" else 2  # FSDP2 gathers and scatters in bfloat16
                moved = expected(engine, method, model, size)
                row: dict[str, object] = {"model": name, "engine": engine, "method": method.name}
                row |= {f"{kind}, MB": round(value / 1e6, 1) for kind, value in moved.items()}
                work = method.work()
                row["forwards of work"] = f"{work:g}"
                compute = work * forward / FLOPS
                for devices in DEVICES:
                    wait = sum(seconds(kind, value, devices, wraps) for kind, value in moved.items() if value)
                    row[f"step at {devices}, s"] = f"{compute + wait:.3f} ({max(compute, wait):.3f})"
                rows.append(row)
    return rows


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    dist.init_process_group("gloo")
    rows = counted()
    if dist.get_rank() == 0:
        record(
            "communication-counted",
            "cpu",
            rows,
            "One step of a model of 2 × (16×32 and 32×16) float32 matrices in two processes, counted call by call. DDP "
            "and FSDP2 are asserted to equal the formulas of `expected` in the script. Under TP the engine's own are "
            "sums of activations.",
        )
        record(
            "communication-projected",
            "cpu",
            projected(),
            "By the formulas, not measured: step time without any overlap of communication and work (and, in brackets, "
            f"with complete overlap) at {FLOPS / 1e12:.0f} TFLOP/s, {NVLINK / 1e9:.0f} GB/s within a node of eight, "
            f"{NETWORK / 1e9:.0f} GB/s between nodes, {LATENCY * 1e6:.0f} µs a message; 128 images or 4,096 tokens a "
            "device. DDP in float32, FSDP2 in bfloat16. The units of work are forwards: 3 for a plain step, 6 for SAM, "
            "5 matrix-free, 3.25 with an eighth of the batch in a matrix-free ascent.",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
