"""Where the time of a step goes, by operator, for AdamW and νSAM, also at a share: why a ratio is what it is.

``python benchmarks/breakdown.py``
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import nusam
import shares
from recording import record
from speed import RHO, adamw, alone, in_two_passes, keep_freed_memory

FIRST, STEPS = 5, 3  # steps 5, 6 and 7 after the first: νSAM compares its layers with gradients in none of them
BATCH = 32
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "matrix-vector products": ("aten::mv", "aten::addmv_", "aten::dot"),
    "norms of the power iteration": ("aten::_foreach_norm", "aten::linalg_vector_norm", "aten::_foreach_div_"),
    "ε in the weights": ("aten::_foreach_addcmul_", "aten::addcmul_"),
}


def milliseconds(step: Callable[[], None]) -> dict[str, float]:
    """Own time of each part in a step, on all threads that run Python."""
    for _ in range(FIRST):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "everything else")
        times[part] += event.self_cpu_time_total / 1e3 / STEPS
    return {part: round(times[part], 1) for part in [*PARTS, "everything else"]}


def steps_of(network: torch.nn.Module) -> dict[str, Callable[[], None]]:
    """One step of each, by name. AdamW's with an eighth more samples has the samples of one pass, and nothing else."""
    x, y = shares.batch_of(BATCH)
    more = shares.batch_of(BATCH + BATCH // 8)

    def backward(xs: torch.Tensor = x, ys: torch.Tensor = y) -> None:
        cross_entropy(network(xs), ys).backward()

    by_gradients = nusam.NuSAM(adamw(network), RHO, model=network, ascent="gradient")
    of_shares = shares.steps_of(network, x, y, {"1": 1.0, "1/8": 1 / 8})
    return {
        "AdamW": of_shares["AdamW"],
        "νSAM by gradients": in_two_passes(by_gradients, backward, x, y),
        "νSAM": of_shares["νSAM 1"],
        "νSAM at 1/8": of_shares["νSAM 1/8"],
        "AdamW, an eighth more samples": alone(adamw(network), lambda: backward(*more)),
        "νSAM at 1/8 in one pass": of_shares["νSAM in one pass 1/8"],
    }


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    table: list[dict[str, object]] = []
    for name, network in shares.networks().items():
        for title, step in steps_of(network).items():
            parts = milliseconds(step)
            table.append({"model": name, "step of": title, **parts, "together": round(sum(parts.values()), 1)})
            print(table[-1], flush=True)
    record(
        "breakdown",
        "cpu",
        table,
        f"Milliseconds of a profiled step by operator, means of {STEPS} steps, batch {BATCH}. νSAM has its default "
        "ascent (matrix-free) unless said otherwise: that saves a third of the matrix products of its pass, and pays "
        "matrix-vector products for it; the rest of a pass (attention, GELU, norms, the head) costs the same. The "
        "profiler slows small operators down: read it for shares, not for ratios.",
    )


if __name__ == "__main__":
    main()
