"""From which matrix size a matrix-free ascent is faster than forming gradients: ``WORTH_SERVING``.

``python benchmarks/breakeven.py [--device cuda]``
"""

import argparse
import statistics
import time

import torch
from torch import nn

import nusam
from recording import record

DEPTH, ROUNDS = 8, 15


def ratio(width: int, rows: int, device: str) -> float:
    """Seconds of a matrix-free ascent pass over those of one by gradients, medians of alternated passes."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(rows, width, device=device)
    seconds: dict[str, list[float]] = {"gradient": [], "matrix-free": []}
    optimizers = {
        ascent: nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model, ascent=ascent)
        for ascent in seconds
    }
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(ROUNDS):
        for ascent, opt in optimizers.items():
            synchronize()
            start = time.perf_counter()
            with opt.ascent():
                model(x).square().mean().backward()
            synchronize()
            seconds[ascent].append(time.perf_counter() - start)
    medians = {ascent: statistics.median(values[1:]) for ascent, values in seconds.items()}
    return medians["matrix-free"] / medians["gradient"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    device = arguments.parse_args().device
    table = []
    for rows in (128, 512, 2048):
        row: dict[str, object] = {"rows": rows}
        row |= {f"width {width}": round(ratio(width, rows, device), 2) for width in (64, 128, 256, 512, 1024)}
        table.append(row)
        print(row, flush=True)
    record("breakeven", device, table, "Matrix-free ascent pass / ascent pass by gradients, square layers. Floor 0.75.")


if __name__ == "__main__":
    main()
