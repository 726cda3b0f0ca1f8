"""Step time with a share of the batch in the ascent, relative to the base optimizer's, alternated in one process.

``python benchmarks/shares.py [--device cuda] [--rounds 9] [--batches 32 128] [--shares 1/8 1/16]``
"""

import argparse
from collections.abc import Callable

import timm
import torch
from torch.nn import functional as F

import models
import nusam
from recording import record
from speed import RHO, adamw, alone, alternate, in_one_pass, in_two_passes, keep_freed_memory

SHARES = {"1": 1.0, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}


def steps_of(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, shares: dict[str, float]
) -> dict[str, Callable[[], None]]:
    """One step of each, all on the same weights: their updates are far too small to matter."""

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def backward(xs: torch.Tensor = x, ys: torch.Tensor = y) -> None:
        loss((xs, ys)).backward()

    steps = {"AdamW": alone(adamw(model), backward)}
    for name, share in shares.items():
        opt = nusam.NuSAM(adamw(model), RHO, model=model, ascent_share=share)
        steps[f"νSAM in one pass {name}"] = in_one_pass(opt, loss, (x, y))
    for name, share in shares.items():
        for title, method in (("νSAM", nusam.NuSAM), ("SAM", nusam.SAM)):
            opt = method(adamw(model), RHO, model=model, ascent_share=share)
            steps[f"{title} {name}"] = in_two_passes(opt, backward, x, y)
    return steps


def networks() -> dict[str, torch.nn.Module]:
    """Those that are timed, for images of 32 × 32 pixels."""
    return {
        "ViT-S/4": models._vit(384, 12, 6, 4, 32),
        "Mixer-S/4": timm.models.MlpMixer(num_classes=10, img_size=32, patch_size=4, num_blocks=8, embed_dim=512),
    }


def batch_of(size: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    return torch.randn(size, 3, 32, 32, device=device), torch.randint(0, 10, (size,), device=device)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--batches", type=int, nargs="*", default=[32, 128])
    arguments.add_argument("--shares", nargs="*", choices=SHARES, default=list(SHARES))
    options = arguments.parse_args()
    keep_freed_memory()
    shares = {name: SHARES[name] for name in options.shares}
    torch.manual_seed(0)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    table = []
    for name, network in networks().items():
        for batch in options.batches:
            steps = steps_of(network.to(options.device), *batch_of(batch, options.device), shares)
            medians = alternate(steps, options.rounds, synchronize)
            row: dict[str, object] = {"model": name, "batch": batch, "AdamW, s": f"{medians['AdamW']:.3f}"}
            row |= {step: round(value / medians["AdamW"], 3) for step, value in medians.items() if step != "AdamW"}
            table.append(row)
            print(row, flush=True)
    table.append(
        {
            "model": "floor",
            **{f"νSAM in one pass {name}": round(1 + 2 / 3 * share, 3) for name, share in shares.items()},
            **{f"νSAM {name}": round(1 + 2 / 3 * share, 3) for name, share in shares.items()},
            **{f"SAM {name}": round(1 + share, 3) for name, share in shares.items()},
        }
    )
    record(
        "shares",
        options.device,
        table,
        "Medians of alternated steps over AdamW's; νSAM with its default ascent (matrix-free). The floor counts passes "
        "alone: an ascent of a share s has s of a plain step's work, and a third less where no gradient of a weight is "
        "formed. Steps in which νSAM compares its layers with the gradients, 2, 4, 8, … after the first, are left out.",
    )


if __name__ == "__main__":
    main()
