"""Step time of every method relative to the base optimizer, alternated in one process.

``python benchmarks/speed.py [--device cuda] [--rounds 9] [--models ViT-S/4 ...]``
"""

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch

import models
import nusam
from recording import record

RHO = 0.01


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as allocators of devices do.

    It returns every block above 32 MB to the system, so that a step pays for its pages anew. Whether that happens hangs
    on the batch size and on what ran before: a step of AdamW on a ViT-S/4 with 128 samples took 4.6 or 6.1 seconds so,
    and 4.4 to 4.7 otherwise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def alone(optimizer: torch.optim.Optimizer, backward: Callable[..., None]) -> Callable[[], None]:
    """A step of the base optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


def in_two_passes(opt: nusam.SharpnessAware, backward: Callable[..., None], *batch: Any) -> Callable[[], None]:
    """A step whose passes go through the batch, if one is given."""

    def step() -> None:
        for part in opt.passes(*batch):
            backward(*(part if batch else ()))
        opt.step()

    return step


def in_one_pass(opt: nusam.SharpnessAware, loss: Callable[[Any], torch.Tensor], batch: Any) -> Callable[[], None]:
    """A step whose ascent came with the step before."""
    gradients = opt.one_pass(itertools.repeat(batch), loss)

    def step() -> None:
        next(gradients)
        opt.step()

    return step


def steps_of(problem: models.Problem, device: str) -> dict[str, Callable[[], None]]:
    """One step of each method, all on the same weights: their updates are far too small to matter."""
    model = problem.model

    def backward() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = problem.loss(model)
        loss.backward()

    def peer(optimizer: pytorch_optimizer.SAM) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            backward()
            optimizer.first_step(zero_grad=True)
            backward()
            optimizer.second_step(zero_grad=True)

        return step

    return {
        "AdamW": alone(adamw(model), backward),
        "pytorch_optimizer SAM": peer(pytorch_optimizer.SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-5)),
        "SAM": in_two_passes(nusam.SAM(adamw(model), RHO, model=model), backward),
        "νSAM by gradients": in_two_passes(nusam.NuSAM(adamw(model), RHO, model=model, ascent="gradient"), backward),
        "νSAM matrix-free": in_two_passes(nusam.NuSAM(adamw(model), RHO, model=model), backward),
    }


def alternate(steps: dict[str, Callable[[], None]], rounds: int, synchronize: Callable[[], None]) -> dict[str, float]:
    """Median seconds a step, but for those that compare layers with gradients: the first, and 2, 4, 8, … after it."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    *_, last = itertools.islice(filter(_serves, itertools.count(2)), rounds)
    for age in range(2, last + 1):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if _serves(age):
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _serves(age: int) -> bool:
    """Whether a step so long after the first compares nothing: no power of two."""
    return bool(age & (age - 1))


def own_work(device: str, rounds: int) -> dict[str, object]:
    """The optimizer's own work by gradients at ViT-B/16's shapes, over reading G and moving W twice."""
    from nusam.lmo import Nuclear
    from nusam.placement.in_weights import in_weights

    model = models.CPU["ViT-B/16"](device).model
    parameters = [p for p in model.parameters() if p.ndim == 2]
    gradients = [torch.randn_like(p) for p in parameters]
    lmo = Nuclear()
    states = [lmo.init_state(p, i) for i, p in enumerate(parameters)]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.no_grad()
    def work() -> None:
        perturbed = in_weights(parameters, lmo(gradients, [1e-6] * len(parameters), states, 0))
        perturbed.add()
        perturbed.remove()

    @torch.no_grad()
    def traffic() -> None:
        for _ in range(2):  # all of them, then all again: a second read at once would come from the cache
            for G in gradients:
                G.sum()
        for _ in range(2):
            for p in parameters:
                p.mul_(1.0)

    seconds: dict[Callable[[], None], list[float]] = {work: [], traffic: []}
    for _ in range(rounds * 3):
        for run, measured in seconds.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            measured.append(time.perf_counter() - start)
    medians = [statistics.median(measured) for measured in seconds.values()]
    return {"model": "own work, ViT-B/16 shapes", "own work / memory traffic": round(medians[0] / medians[1], 2)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--models", nargs="*")
    options = arguments.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    zoo = models.CUDA if options.device == "cuda" else models.CPU
    table = []
    for name in options.models or zoo:
        problem = zoo[name](options.device)
        synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
        medians = alternate(steps_of(problem, options.device), options.rounds, synchronize)
        row: dict[str, object] = {"model": name, "AdamW, s": f"{medians['AdamW']:.3f}"}
        row |= {method: round(value / medians["AdamW"], 3) for method, value in medians.items() if method != "AdamW"}
        row["matrix-free / SAM"] = round(medians["νSAM matrix-free"] / medians["SAM"], 3)
        row["gradients / peer"] = round(medians["νSAM by gradients"] / medians["pytorch_optimizer SAM"], 3)
        table.append(row)
        print(row, flush=True)
    table.append(own_work(options.device, options.rounds))
    record(
        "speed",
        options.device,
        table,
        "Medians of alternated steps, relative to AdamW unless said otherwise. In units of a forward (1; a backward is "
        "2): AdamW 3, SAM and νSAM by gradients 6, νSAM matrix-free 5. So the floors are 2 and 1.667 times AdamW, and "
        "0.833 for matrix-free / SAM. νSAM compares its layers with the gradients in the first step and 2, 4, 8, … "
        "after; the median is of the others.",
    )


if __name__ == "__main__":
    main()
