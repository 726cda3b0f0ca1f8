"""Table 2: training from scratch."""

from nusam.experiments.method_table import ADAMW, NUSAM, SAM, SAM_ON, MethodTable

TABLE = MethodTable(
    name="table2",
    title="Training from scratch with augmentation",
    contenders=(ADAMW, SAM, SAM_ON, NUSAM),
    paper={
        "Mixer-B/4": {"AdamW": 91.00, "SAM": 91.70, "SAM-ON": 91.73, "νSAM": 92.23},
        "Mixer-S/4": {"AdamW": 91.08, "SAM": 91.96, "SAM-ON": 92.00, "νSAM": 92.24},
        "ViT-B/4": {"AdamW": 93.45, "SAM": 94.62, "SAM-ON": 94.90, "νSAM": 94.44},
        "ViT-S/4": {"AdamW": 93.37, "SAM": 94.21, "SAM-ON": 94.65, "νSAM": 94.39},
    },
    paper_setting="CIFAR-10",
    recipe={"smoke": {"augment": "crop"}, "cpu": {"augment": "crop"}},
    notes=("At the small scales images are cropped at random, and neither flipped nor AutoAugmented.",),
)
