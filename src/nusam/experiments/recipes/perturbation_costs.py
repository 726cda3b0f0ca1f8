"""Table 1: what ε costs beside each base optimizer, held against the paper's text."""

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nusam.experiments.pages.result import Result
from nusam.experiments.recipes.memory_table import BASES, Cost, costs, network

__all__ = ["table1"]


SCALES = ("smoke", "cpu", "full")
VITS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
TINY = {"ViT, tiny": "test_vit"}
STATED = {  # what the paper's text says of ε; the cells of its Table 1 are not in it
    ("ViT-B/16", "νSAM"): "saves more than 99.8%",
    ("ViT-L/16", "νSAM"): "395k floats",
    ("ViT-L/16", "SAM"): "304M floats",
}


def table1(scale: str) -> Result:
    """Table 1: what ε costs for ViT-B/16 and ViT-L/16; at scale "smoke" for a tiny ViT as well.

    Nothing is trained, so that the scales "cpu" and "full" are the same.

    Raises:
        ValueError: if the scale is none of smoke, cpu and full.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}.")
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    for title, name in {**VITS, **(TINY if scale == "smoke" else {})}.items():
        rows += [_row(title, line) for line in costs(network(name).on_meta())]
    return Result(
        name="table1",
        title="Memory of the perturbation ε, and of training with it relative to the base optimizer alone",
        scale=scale,
        data="",
        columns=list(rows[0]),
        rows=rows,
        findings=_findings(rows),
        notes=[
            "Counted from the shapes of timm's models with 1000 classes; bytes of weights, gradients, ε and base "
            "state, without activations. SGD has no momentum.",
            "SSAM and FSAM are published, not measured: the paper states that SSAM can save 50% and FSAM roughly 90% "
            "of ε; their floats and bytes follow from these shares.",
            "The cells of the paper's Table 1 are not in its text, nor are the counts for ViT-B/16: beside ours stand "
            "only the figures that the text states.",
        ],
        circumstances={
            "device": "meta",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("nusam", "torch", "timm")},
            "seconds": round(time.monotonic() - began, 1),
        },
    )


def _row(model: str, line: Cost) -> dict[str, Any]:
    paper = {"SSAM": "can save 50%", "FSAM": "saves roughly 90%"}.get(line.method)
    return {
        "model": model,
        "method": line.method,
        "floats of ε": line.perturbation,
        "saved": None if line.saved is None else round(line.saved, 5),
        "paper": STATED.get((model, line.method), paper),
        "source": "published" if line.published else "counted",
        **{f"bytes over {base.title}": round(line.relative[name], 4) for name, base in BASES.items()},
    }


def _findings(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = {(row["model"], row["method"]): row for row in rows}
    large, large_sam = (cells["ViT-L/16", method]["floats of ε"] for method in ("νSAM", "SAM"))
    small, small_sam = (cells["ViT-B/16", method]["floats of ε"] for method in ("νSAM", "SAM"))
    saved = 1 - small / small_sam
    return "\n".join(
        [
            f"- ViT-L/16: νSAM's ε has {large:,} floats where the paper says 395k: "
            f"{_verdict(round(large / 1e3) == 395)}; SAM's has {large_sam:,} where it says 304M: "
            f"{_verdict(round(large_sam / 1e6) == 304)}.",
            f"- ViT-B/16: νSAM's ε has {small:,} floats instead of {small_sam:,}, which saves {100 * saved:.2f}% "
            f"where the paper says more than 99.8%: {_verdict(saved > 0.998)}.",
        ]
    )


def _verdict(agrees: bool) -> str:
    return "agrees" if agrees else "**does not agree**"
