"""Step time of networks of convolutions whose kernels are perturbed, relative to the base optimizer's.

``python benchmarks/convolutions.py [--device cuda] [--rounds 9] [--models resnet18 ...]``
"""

import argparse
from collections.abc import Callable

import timm
import torch
from torch.nn import functional as F

import nusam
from recording import record
from speed import RHO, adamw, alone, alternate, in_two_passes

NETWORKS = {  # name: size of its images, and of a batch of them
    "resnet18": (64, 32),
    "resnet50": (64, 16),
    "convnext_atto": (64, 32),
}


def steps_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], None]]:
    """One step of each, all on the same weights: their updates are far too small to matter."""

    def backward() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()

    def nu_sam(**options: object) -> Callable[[], None]:
        return in_two_passes(nusam.NuSAM(adamw(model), RHO, model=model, **options), backward)

    return {
        "AdamW": alone(adamw(model), backward),
        "νSAM, matrices alone": nu_sam(),
        "νSAM": nu_sam(convolutions=True),
        "νSAM in the forward": nu_sam(convolutions=True, placement="forward"),
        "νSAM by gradients": nu_sam(convolutions=True, ascent="gradient"),
        "SAM": in_two_passes(nusam.SAM(adamw(model), RHO, model=model), backward),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--models", nargs="*", default=list(NETWORKS))
    options = arguments.parse_args()
    torch.manual_seed(0)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    table = []
    for name in options.models:
        size, batch = NETWORKS[name]
        # a residual branch that begins at zero has no gradient to compare with
        start = {"zero_init_last": False} if name.startswith("resnet") else {}
        model = timm.create_model(name, num_classes=10, **start).to(options.device)
        x = torch.randn(batch, 3, size, size, device=options.device)
        y = torch.randint(0, 10, (batch,), device=options.device)
        medians = alternate(steps_of(model, x, y), options.rounds, synchronize)
        row: dict[str, object] = {"model": name, "images": f"{batch} of {size}×{size}"}
        for convolutions in (False, True):
            opt = nusam.NuSAM(adamw(model), RHO, model=model, convolutions=convolutions)
            row["perturbed" if convolutions else "of them matrices"] = f"{opt.coverage().share:.2%}"
        row["AdamW, s"] = f"{medians['AdamW']:.3f}"
        row |= {method: round(value / medians["AdamW"], 3) for method, value in medians.items() if method != "AdamW"}
        table.append(row)
        print(row, flush=True)
    record(
        "convolutions",
        options.device,
        table,
        "Medians of alternated steps, relative to AdamW. νSAM has convolutions=True and its default ascent unless said "
        "otherwise; shares are those of all trainable entries. In units of a forward (1; a backward is 2): AdamW 3, "
        "SAM and νSAM by gradients 6, νSAM 5, so that the floors are 2 and 1.667. νSAM compares its layers with the "
        "gradients in the first step and 2, 4, 8, … after; the median is of the others.",
    )


if __name__ == "__main__":
    main()
