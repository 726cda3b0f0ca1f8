"""Table 4: fine-tuning of pretrained vision models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nusam.experiments.contest import Setting
from nusam.experiments.experiment import Bench
from nusam.experiments.fine_tuning import fine_tuning_data, fine_tuning_settings
from nusam.experiments.method_table import ADAMW, NUSAM, SAM, SAM_ON, MethodTable


@dataclass(frozen=True)
class FineTuningTable(MethodTable):
    """Contenders that start from the same pretrained weights."""

    def data(self, scale: str) -> tuple[str, ...]:
        """What is fine-tuned on."""
        return fine_tuning_data(scale)

    def settings(self, bench: Bench, changes: Mapping[str, Any]) -> list[Setting]:
        """Pretrain what has not been."""
        return fine_tuning_settings(bench)


TABLE = FineTuningTable(
    name="table4",
    title="Fine-tuning",
    contenders=(ADAMW, SAM, SAM_ON, NUSAM),
    paper={
        "Mixer-B/16": {"AdamW": 97.16, "SAM": 97.52, "SAM-ON": 97.58, "νSAM": 97.72},
        "ViT-B/16": {"AdamW": 98.36, "SAM": 98.87, "SAM-ON": 98.74, "νSAM": 98.89},
        "ViT-S/16": {"AdamW": 98.38, "SAM": 98.85, "SAM-ON": 98.73, "νSAM": 98.81},
    },
    counterparts={"mixer": "Mixer-B/16", "vit": "ViT-S/16"},
    paper_setting="CIFAR-10",
    needs="Fashion-MNIST at the cpu scale, pretrained weights at the full one",
    notes=(
        "At the cpu scale the models are pretrained here with AdamW, on 4,000 images of Fashion-MNIST for 20 epochs, "
        "and fine-tuned on 300 digits, enlarged to 28×28; the learning rate 1e-3 is ours.",
    ),
)
