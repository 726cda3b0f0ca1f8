"""Where the time of a step goes, by operator, for AdamW and the two ascents of νSAM: why a ratio is what it is.

``python benchmarks/breakdown.py``
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import models
from recording import record
from speed import steps_of

STEPS = 3
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "matrix-vector products": ("aten::mv", "aten::addmv_", "aten::dot"),
    "norms of the power iteration": ("aten::_foreach_norm", "aten::linalg_vector_norm", "aten::_foreach_div_"),
    "ε in the weights": ("aten::_foreach_addcmul_", "aten::addcmul_"),
}


def milliseconds(step: Callable[[], None]) -> dict[str, float]:
    """Own time of each part in a step, on all threads that run Python."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "everything else")
        times[part] += event.self_cpu_time_total / 1e3 / STEPS
    return {part: round(times[part], 1) for part in [*PARTS, "everything else"]}


def main() -> None:
    torch.manual_seed(0)
    table: list[dict[str, object]] = []
    for name in ("ViT-S/4", "Mixer-S/4"):
        steps = steps_of(models.CPU[name]("cpu"), "cpu")
        for method in ("AdamW", "νSAM by gradients", "νSAM matrix-free"):
            parts = milliseconds(steps[method])
            table.append({"model": name, "step of": method, **parts, "together": round(sum(parts.values()), 1)})
            print(table[-1], flush=True)
    record(
        "breakdown",
        "cpu",
        table,
        "Milliseconds of a profiled step by operator, means of three steps. A matrix-free ascent saves a third of the "
        "matrix products of its pass, and pays matrix-vector products for it; the rest of a pass (attention, GELU, "
        "norms, the head) costs the same. The profiler slows small operators down: read it for shares, not for ratios.",
    )


if __name__ == "__main__":
    main()
