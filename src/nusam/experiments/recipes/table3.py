"""Table 3: training from scratch without AutoAugment."""

from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, SAM_ON, MethodTable

TABLE = MethodTable(
    name="table3",
    title="Training from scratch with less augmentation",
    contenders=(ADAMW, SAM, SAM_ON, NUSAM),
    paper={
        "cifar10": {
            "Mixer-S/4": {"AdamW": "85.79", "SAM": "87.92", "SAM-ON": "86.18", "νSAM": "88.55"},
            "ViT-S/4": {"AdamW": "88.49", "SAM": "89.90", "SAM-ON": "90.74", "νSAM": "90.42"},
        },
        "cifar100": {
            "Mixer-S/4": {"AdamW": "59.09", "SAM": "60.73", "SAM-ON": "60.52", "νSAM": "61.09"},
            "ViT-S/4": {"AdamW": "61.22", "SAM": "65.11", "SAM-ON": "66.01", "νSAM": "65.29"},
        },
    },
    paper_best=False,
    models_of_paper=("mixer-s/4", "vit-s/4"),
    data_of_paper=("cifar10", "cifar100"),
    published={"augment": "crop-flip"},
    recipe={"full": {"augment": "crop-flip"}},
    notes=("The paper leaves out AutoAugment; at the small scales, which never have it, the crops are left out.",),
)
