"""The methods beside νSAM in several processes: equal to one process on the joint batch, or refused before anything."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import nusam
from tests.distributed.engines import DEVICE, ENGINES, Net, base_optimizer, full, micro_batches, shares, train
from tests.distributed.running import Checks

STEPS = 5
METHODS: dict[str, Callable[..., nusam.SharpnessAware]] = {
    "ASAM": nusam.ASAM,
    "VaSSO": partial(nusam.VaSSO, theta=0.4),
    "FriendlySAM": nusam.FriendlySAM,
    "USAM": nusam.USAM,
    "SSAM": partial(nusam.SSAM, refresh=3),
    "RWP": nusam.RWP,
    "m-RWP": partial(nusam.RWP, mixture=0.3),
    "GSAM": nusam.GSAM,
    "WSAM": nusam.WSAM,
    "LookSAM": partial(nusam.LookSAM, every=3),
}
BALLS: dict[str, Callable[..., nusam.SharpnessAware]] = {
    "NuSAM": partial(nusam.NuSAM, power_iterations=20),
    "NuSAMNorm": partial(nusam.NuSAMNorm, power_iterations=20),
    "SAM": nusam.SAM,
    "SAMON": nusam.SAMON,
}
BLIND = {"SSAM", "RWP", "m-RWP"}  # need a parameter as a whole
CHECKS: Checks = {2: {}, 4: {}}


def equals_one_process(engine: str, method: str, accumulate: bool) -> None:
    together, alone = ENGINES[engine][1](Net(torch.float64)), Net(torch.float64)
    opt = METHODS[method](base_optimizer("SGD", together), 0.1, model=together)
    train(together, opt, torch.float64, accumulate, *shares(engine), steps=STEPS)
    opt = METHODS[method](base_optimizer("SGD", alone), 0.1, model=alone)
    train(alone, opt, torch.float64, accumulate, steps=STEPS)
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=1e-10)


class Words(nn.Module):
    """A block between an embedding and a head, with norms that tensor parallelism may give a part of the words each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.before, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last = nn.LayerNorm(8)
        self.to(DEVICE, torch.float64)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.head(self.last(x + self.down(torch.tanh(self.up(self.before(x))))))


def in_sequence(embedding: Callable[..., ParallelStyle]) -> dict[str, ParallelStyle]:
    """The usual plan of a language model, which leaves gradients of norms in summands, and the embedding's whole."""
    return {
        "words": embedding(output_layouts=Shard(1)),
        "before": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


by_rows = partial(RowwiseParallel, input_layouts=Replicate())
PLANS: dict[str, dict[str, ParallelStyle]] = {
    "in sequence": in_sequence(by_rows),
    "in sequence, embedding by columns": in_sequence(ColwiseParallel),
    "embedding by rows": {"words": by_rows(), "up": ColwiseParallel(), "down": RowwiseParallel()},
}


def equals_one_process_in_blocks(plan: str, method: str, accumulate: bool) -> None:
    """Whatever layout tensor parallelism leaves gradients in."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    models = parallelize_module(Words(), mesh["tp"], PLANS[plan]), Words()
    if mesh["dp"].size() > 1:
        fully_shard(models[0], mesh=mesh["dp"])
    for model, parts in zip(models, (mesh["dp"].size(), 1), strict=True):
        opt = (METHODS | BALLS)[method](base_optimizer("SGD", model), 0.1, model=model)
        for step in range(STEPS):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            words = torch.randint(0, 10, (4, 6), generator=generator).to(DEVICE)
            for whole in words.chunk(2 if accumulate else 1):
                part = whole.chunk(parts)[mesh.get_local_rank("dp") % parts]
                for _ in opt.passes(accumulate=accumulate):
                    nn.functional.cross_entropy(model(part).flatten(0, 1), part.roll(1, 1).flatten()).backward()
            opt.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=1e-10)
        if hasattr(p, "placements") and all(placement.is_replicate() for placement in p.placements):
            torch.testing.assert_close(p.to_local().detach(), q.detach(), rtol=0, atol=1e-10)


def under_no_sync(method: str, where: str) -> None:
    """Replicas stay equal to one process, whether the loop enters ``no_sync`` around the passes or inside of them."""
    together, alone = ENGINES["DDP"][1](Net(torch.float64)), Net(torch.float64)
    opt = METHODS[method](base_optimizer("SGD", together), 0.1, model=together)
    for step in range(STEPS):
        opt.zero_grad()
        for k, (x, y) in enumerate(micro_batches(step, torch.float64, True, *shares("DDP"))):
            with together.no_sync() if k == 0 and where == "around" else nullcontext():
                for _ in opt.passes(accumulate=True):
                    with together.no_sync() if k == 0 and where == "inside" else nullcontext():
                        (nn.functional.cross_entropy(together(x), y) / 2).backward()
        opt.step()
    opt = METHODS[method](base_optimizer("SGD", alone), 0.1, model=alone)
    train(alone, opt, torch.float64, True, steps=STEPS)
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-10)
    with together.no_sync():  # which is DDP's own again
        assert not together.require_backward_grad_sync


def refuses_an_unknown_no_sync(method: str) -> None:
    """Without ``model=`` nobody can reduce in its place."""
    model = ENGINES["DDP"][1](Net(torch.float64))
    opt = METHODS[method](base_optimizer("SGD", model), 0.1)
    x, y = next(micro_batches(0, torch.float64, False, *shares("DDP")))
    with model.no_sync(), pytest.raises(RuntimeError, match=r"no_sync\(\) .* pass the wrapped module as model="):
        for _ in opt.passes(accumulate=True):
            nn.functional.cross_entropy(model(x), y).backward()
    for _ in opt.passes():
        nn.functional.cross_entropy(model(x), y).backward()
    opt.step()


def resumes_to_the_bit(engine: str, method: str) -> None:
    """From a state dict as it is kept in memory; every process has its own part."""
    model = ENGINES[engine][1](Net(torch.float64))
    opt = METHODS[method](base_optimizer("SGD", model), 0.1, model=model)
    train(model, opt, torch.float64, False, *shares(engine), steps=2)
    other = ENGINES[engine][1](Net(torch.float64))
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    resumed = METHODS[method](base_optimizer("SGD", other), 0.1, model=other)
    resumed.load_state_dict(_copied(opt.state_dict()))
    for trained, its in ((model, opt), (other, resumed)):
        train(trained, its, torch.float64, False, *shares(engine), steps=2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(p), full(q))


def _copied(value: object) -> object:
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def is_refused(method: str) -> None:
    model = ENGINES["FSDP2"][1](Net(torch.float64))
    with pytest.raises(NotImplementedError, match=r"is sharded, which (Sparse|RowNoise) can't see through"):
        METHODS[method](base_optimizer("SGD", model), 0.1, model=model)


def takes_no_m_sam(method: str) -> None:
    """Every process would have a g of its own beside a ĝ of all."""
    model = ENGINES["DDP"][1](Net(torch.float64))
    with pytest.raises(ValueError, match="combination= would mix a gradient of this process"):
        METHODS[method](base_optimizer("SGD", model), 0.1, model=model, m_sam=True)


for engine in ("DDP", "FSDP2"):
    for number, method in enumerate(METHODS):
        if engine == "FSDP2" and method in BLIND:
            CHECKS[2][f"{method} is refused"] = partial(is_refused, method)
            continue
        # with accumulation under the one engine or the other, but for SSAM, whose mask is of each process's own order
        # of micro-batches
        accumulate = method != "SSAM" and (number % 2 == 0) == (engine == "DDP")
        CHECKS[2][f"{method} {engine} {accumulate=}"] = partial(equals_one_process, engine, method, accumulate)
        CHECKS[2][f"{method} {engine} resumed"] = partial(resumes_to_the_bit, engine, method)
for number, method in enumerate(name for name in (*METHODS, *BALLS) if name not in BLIND):
    plans = [*PLANS] if method in ("GSAM", "LookSAM") else [*PLANS][:1]
    for plan, accumulate in zip(plans, (number % 2 == 0, number % 2 == 1, False), strict=False):
        for processes in (2, 4) if method in ("GSAM", "SAM") else (2,):
            CHECKS[processes][f"{method} TP {plan} {accumulate=}"] = partial(
                equals_one_process_in_blocks, plan, method, accumulate
            )
for method in ("GSAM", "WSAM", "LookSAM", "m-RWP"):
    CHECKS[2][f"{method} and m-SAM"] = partial(takes_no_m_sam, method)
    CHECKS[2][f"{method} under an unknown no_sync"] = partial(refuses_an_unknown_no_sync, method)
for method in [name for name in METHODS if name != "SSAM"]:
    for where in ("around", "inside"):
        CHECKS[2][f"{method} with no_sync {where}"] = partial(under_no_sync, method, where)
