"""Table 4: fine-tuning of pretrained vision models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.recipes.fine_tuning import (
    ONE_SET,
    PUBLISHED,
    fine_tuning_data,
    fine_tuning_ours,
    fine_tuning_settings,
)
from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, SAM_ON, MethodTable, stand_ins
from nusam.experiments.runs.contest import Setting


@dataclass(frozen=True)
class FineTuningTable(MethodTable):
    """Contenders that start from the same pretrained weights."""

    def data(self, scale: str) -> tuple[str, ...]:
        """What is fine-tuned on."""
        return fine_tuning_data(scale)

    def ours(self, scale: str) -> str:
        """Where the weights come from."""
        return fine_tuning_ours(scale)

    def settings(self, bench: Bench, changes: Mapping[str, Any]) -> list[Setting]:
        """Pretrain what has not been."""
        return fine_tuning_settings(bench)


TABLE = FineTuningTable(
    name="table4",
    title="Fine-tuning",
    contenders=(ADAMW, SAM, SAM_ON, NUSAM),
    paper={
        "cifar10": {
            "Mixer-B/16": {
                "AdamW": "97.16 ± 0.16",
                "SAM": "97.52 ± 0.08",
                "SAM-ON": "97.58 ± 0.10",
                "νSAM": "97.72 ± 0.05",
            },
            "ViT-B/16": {
                "AdamW": "98.36 ± 0.19",
                "SAM": "98.87 ± 0.05",
                "SAM-ON": "98.74 ± 0.10",
                "νSAM": "98.89 ± 0.03",
            },
            "ViT-S/16": {
                "AdamW": "98.38 ± 0.02",
                "SAM": "98.85 ± 0.00",
                "SAM-ON": "98.73 ± 0.01",
                "νSAM": "98.81 ± 0.02",
            },
        },
        "cifar100": {
            "Mixer-B/16": {
                "AdamW": "85.87 ± 0.05",
                "SAM": "86.20 ± 0.19",
                "SAM-ON": "86.39 ± 0.17",
                "νSAM": "86.88 ± 0.25",
            },
            "ViT-B/16": {
                "AdamW": "90.54 ± 0.03",
                "SAM": "92.12 ± 0.13",
                "SAM-ON": "91.47 ± 0.05",
                "νSAM": "91.89 ± 0.13",
            },
            "ViT-S/16": {
                "AdamW": "91.10 ± 0.12",
                "SAM": "91.74 ± 0.23",
                "SAM-ON": "91.37 ± 0.13",
                "νSAM": "91.60 ± 0.05",
            },
        },
    },
    paper_best=False,
    published=PUBLISHED,
    counterparts=stand_ins("Mixer-B/16", "ViT-S/16"),
    needs="Fashion-MNIST at the cpu scale, pretrained weights at the full one",
    notes=(
        ONE_SET,
        "± is the standard deviation of 3 runs in the paper's cells, and the standard error of the seeds in ours.",
    ),
)
