"""Table 2: training from scratch."""

from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, SAM_ON, MethodTable

TABLE = MethodTable(
    name="table2",
    title="Training from scratch with augmentation",
    contenders=(ADAMW, SAM, SAM_ON, NUSAM),
    paper={
        "cifar10": {
            "Mixer-B/4": {"AdamW": "91.00", "SAM": "91.70", "SAM-ON": "91.73", "νSAM": "92.23"},
            "Mixer-S/4": {"AdamW": "91.08", "SAM": "91.96", "SAM-ON": "92.00", "νSAM": "92.24"},
            "ViT-B/4": {"AdamW": "93.45", "SAM": "94.62", "SAM-ON": "94.90", "νSAM": "94.44"},
            "ViT-S/4": {"AdamW": "93.37", "SAM": "94.21", "SAM-ON": "94.65", "νSAM": "94.39"},
        },
        "cifar100": {
            "Mixer-B/4": {"AdamW": "66.90", "SAM": "69.54", "SAM-ON": "68.25", "νSAM": "70.09"},
            "Mixer-S/4": {"AdamW": "68.03", "SAM": "70.35", "SAM-ON": "69.35", "νSAM": "70.79"},
            "ViT-B/4": {"AdamW": "68.25", "SAM": "70.26", "SAM-ON": "71.25", "νSAM": "70.15"},
            "ViT-S/4": {"AdamW": "68.17", "SAM": "71.71", "SAM-ON": "72.70", "νSAM": "70.60"},
        },
    },
    models_of_paper=("mixer-b/4", "mixer-s/4", "vit-b/4", "vit-s/4"),
    data_of_paper=("cifar10", "cifar100"),
    recipe={"smoke": {"augment": "crop"}, "cpu": {"augment": "crop"}},
    notes=("At the small scales images are cropped at random, and neither flipped nor AutoAugmented.",),
)
