"""An ascent on a share of the batch, of which every process cuts its own part."""

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from tests.distributed import oracle
from tests.distributed.engines import BATCH, ENGINES, Net, full, sample, shares
from tests.distributed.problem import BALLS
from tests.distributed.running import Checks

STEPS, RATE, RHO, SHARE = 5, 0.2, 0.1, 1 / 4
CHECKS: Checks = {2: {}}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def by_hand(parts: int, ball: str, each: bool, micro_batches: int) -> nn.Module:
    """The same by one process, from singular value decompositions."""
    model = Net(torch.float64)
    epsilons = BALLS[ball][1]
    count = BATCH // parts // micro_batches // 4
    for step in range(STEPS):
        total: oracle.Gradients = {}
        for piece in range(micro_batches):
            batch = [t.chunk(micro_batches)[piece] for t in sample(step, torch.float64)]

            def backward(model: nn.Module, process: int, first: int | None = None, batch: list[Tensor] = batch) -> None:
                loss_of(model, *(t.chunk(parts)[process][:first] for t in batch)).backward()

            def of(process: int, backward: oracle.Backward = backward) -> oracle.Backward:
                return lambda model, _: backward(model, process)

            ascent = partial(backward, first=count)
            ways = [(of(part), of(part, ascent)) for part in range(parts)] if each else [(backward, ascent)]
            for descends, ascends in ways:
                found = oracle.at_epsilon(model, descends, epsilons, RHO, 1 if each else parts, ascends)
                for name, gradient in found.items():
                    total[name] = total.get(name, 0) + gradient / len(ways) / micro_batches
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * total[name]
    return model


def equals_the_step_by_hand(
    engine: str, ball: str = "NuSAM", m_sam: bool = False, micro_batches: int = 1, **options: str
) -> None:
    parts, part = shares(engine)
    model = ENGINES[engine][1](Net(torch.float64))
    opt = BALLS[ball][0](
        torch.optim.SGD(model.parameters(), lr=RATE), RHO, model=model, m_sam=m_sam, ascent_share=SHARE, **options
    )
    for step in range(STEPS):
        opt.zero_grad()
        sizes = []
        for batch in zip(*(t.chunk(micro_batches) for t in sample(step, torch.float64)), strict=True):
            for x, y in opt.passes(*(t.chunk(parts)[part] for t in batch), accumulate=True):
                (loss_of(model, x, y) / micro_batches).backward()
                sizes.append(len(y))
        opt.step()
        own = BATCH // parts // micro_batches
        assert sizes == [own // 4, own] * micro_batches
    for p, q in zip(model.parameters(), by_hand(parts, ball, m_sam, micro_batches).parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=1e-8)


for engine, (ascent, placement) in product(
    ("DDP", "FSDP2", "TP"), (("gradient", "weights"), ("matrix-free", "weights"), ("matrix-free", "forward"))
):
    case = partial(equals_the_step_by_hand, engine, ascent=ascent, placement=placement)
    CHECKS[2][f"a share of the batch {engine} NuSAM {ascent} {placement}"] = case
for engine in ("DDP", "FSDP2", "TP"):
    CHECKS[2][f"a share of the batch {engine} SAM"] = partial(equals_the_step_by_hand, engine, "SAM")
    case = partial(equals_the_step_by_hand, engine, micro_batches=2, ascent="matrix-free")
    CHECKS[2][f"a share of each micro-batch {engine}"] = case
for engine, options in (("DDP", {"ascent": "matrix-free"}), ("DDP", {"ascent": "gradient"}), ("FSDP2", {})):
    case = partial(equals_the_step_by_hand, engine, m_sam=True, **options)
    CHECKS[2][f"a share of the batch {engine} m-SAM {options.get('ascent', 'auto')}"] = case
