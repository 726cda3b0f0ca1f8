"""Peak training bytes of parameters, gradients, ε and base state, relative to the weights.

Counted by the allocator (the profiler's memory events) over one step after the first, on a stack of linear layers
with a batch of one, so that activations are nothing beside the weights. ``python benchmarks/memory.py``
"""

import argparse
from collections.abc import Callable

import pytorch_optimizer
import torch
from torch import nn

import nusam
from nusam.experiments.recipes.allocations import mark, moments
from recording import record

WIDTH, DEPTH = 2048, 24


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def peak_and_ascent(prepare: Callable[[Stack], Callable[[], None]]) -> tuple[float, float]:
    """Peak bytes of the second step, and bytes above weights and state at the end of its ascent, over weights."""
    weights = 4 * sum(p.numel() for p in Stack().parameters())

    def program() -> None:
        step = prepare(Stack())
        step()
        mark("second")
        step()

    seen = moments(program)
    second = seen[[moment.mark for moment in seen].index("second") :]
    ascent = next((moment.live - second[0].live for moment in second if moment.mark == "ascent"), 0)
    return max(moment.live for moment in second) / weights, ascent / weights


def ours(make: Callable[[Stack], nusam.SharpnessAware]) -> Callable[[Stack], Callable[[], None]]:
    def prepare(model: Stack) -> Callable[[], None]:
        opt = make(model)
        x = torch.randn(1, WIDTH)

        def step() -> None:
            for name in opt.passes():
                model(x).square().mean().backward()
                mark(name)
            opt.step()
            opt.zero_grad()

        return step

    return prepare


def bare(make: Callable[[Stack], torch.optim.Optimizer]) -> Callable[[Stack], Callable[[], None]]:
    def prepare(model: Stack) -> Callable[[], None]:
        optimizer = make(model)
        x = torch.randn(1, WIDTH)

        def step() -> None:
            model(x).square().mean().backward()
            if isinstance(optimizer, pytorch_optimizer.SAM):
                mark("ascent")
                optimizer.first_step(zero_grad=True)
                model(x).square().mean().backward()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


def in_backward(base: Callable[[Stack], torch.optim.Optimizer]) -> Callable[[Stack], nusam.SharpnessAware]:
    def make(model: Stack) -> nusam.SharpnessAware:
        opt = nusam.NuSAM(base(model), model=model)
        nusam.step_in_backward(opt)
        return opt

    return make


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = []
    for name, kind, options in (
        ("SGD", torch.optim.SGD, {"lr": 1e-3, "foreach": False}),
        ("AdamW", torch.optim.AdamW, {"lr": 1e-3, "foreach": False}),
        ("Adafactor", torch.optim.Adafactor, {"lr": 1e-3, "foreach": False}),
    ):

        def base(model: Stack, kind=kind, options=options) -> torch.optim.Optimizer:
            return kind(model.parameters(), **options)

        methods = {
            "base alone": bare(base),
            "pytorch_optimizer SAM": bare(lambda m, k=kind, o=options: pytorch_optimizer.SAM(m.parameters(), k, **o)),
            "SAM": ours(lambda m, base=base: nusam.SAM(base(m), model=m)),
            "νSAM by gradients": ours(lambda m, base=base: nusam.NuSAM(base(m), model=m, ascent="gradient")),
            "νSAM matrix-free": ours(lambda m, base=base: nusam.NuSAM(base(m), model=m)),
            "νSAM step in backward": ours(in_backward(base)),
        }
        for method, prepare in methods.items():
            peak, ascent = peak_and_ascent(prepare)
            table.append(
                {
                    "base optimizer": name,
                    "method": method,
                    "peak / weights": f"{peak:.3f}",
                    "gradients after the ascent / weights": f"{ascent:.3f}" if method != "base alone" else "",
                }
            )
            print(table[-1], flush=True)
    record(
        "memory",
        "cpu",
        table,
        f"{DEPTH} matrices of {WIDTH}×{WIDTH}; bytes counted by the allocator in the second step. Floors with SGD: "
        "base "
        "alone 2 (weights and gradients), SAM 3, νSAM 2 + Σ(n+m)/Σnm, step in backward 1 + 1/24.",
    )


if __name__ == "__main__":
    main()
