"""Steps of a model so small that launches dominate, over a SAM written by hand with foreach operations.

``python benchmarks/launches.py [--device cuda] [--rounds 200]``
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import nusam
from recording import record
from speed import alone, in_one_pass, in_two_passes

RHO = 0.01


def small_vit(device: str) -> nn.Module:
    """12 blocks of width 16, 152 parameters, of which 50 are matrices."""
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=12, num_heads=2, num_classes=10
    ).to(device)  # fmt: skip


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> Callable[[], None]:
    """SAM as few launches as it can be."""
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        backward()
        with torch.no_grad():
            gradients: list[Tensor] = [p.grad for p in parameters]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            epsilon = torch._foreach_mul(gradients, RHO / (norm + 1e-12))
            torch._foreach_add_(parameters, epsilon)
        optimizer.zero_grad()
        backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, epsilon)
        optimizer.step()

    return step


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--rounds", type=int, default=200)
    options = arguments.parse_args()
    model = small_vit(options.device)
    x = torch.randn(8, 3, 16, 16, device=options.device)
    y = torch.arange(8, device=options.device)

    def backward() -> None:
        nn.functional.cross_entropy(model(x), y).backward()

    def base() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def ours(opt: nusam.SharpnessAware) -> Callable[[], None]:
        return in_two_passes(opt, backward)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    riding = nusam.NuSAM(base(), RHO, model=model, ascent_share=1 / 8)
    serve = {"ascent": "matrix-free"}
    steps = {
        "SGD": alone(base(), backward),
        "SAM by hand": by_hand(model, base(), backward),
        "SAM": ours(nusam.SAM(base(), RHO, model=model)),
        "νSAM by gradients": ours(nusam.NuSAM(base(), RHO, model=model, ascent="gradient")),
        "νSAM matrix-free": ours(nusam.NuSAM(base(), RHO, model=model, **serve)),
        "νSAM matrix-free, ε in the forward": ours(nusam.NuSAM(base(), RHO, model=model, placement="forward", **serve)),
        "νSAM in one pass, 1/8": in_one_pass(riding, loss, (x, y)),
    }
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[5:]) for name, values in seconds.items()}
    one, hand = medians["SGD"], medians["SAM by hand"]
    rows = [
        {
            "step": name,
            "milliseconds": f"{1000 * value:.2f}",
            "over SGD": f"{value / one:.3f}",
            "over SAM by hand": f"{value / hand:.3f}",
        }
        for name, value in medians.items()
    ]
    for row in rows:
        print(row, flush=True)
    record(
        "launches",
        options.device,
        rows,
        "A ViT of 12 blocks and width 16, 8 images of 16×16; medians of alternated steps.",
    )


if __name__ == "__main__":
    main()
