"""Table 8: νSAM-Norm."""

from nusam.experiments.recipes.method_table import ADAMW, NUSAM, SAM, MethodTable
from nusam.experiments.runs.contest import Contender

TABLE = MethodTable(
    name="table8",
    title="νSAM-Norm (Appendix C.1)",
    contenders=(ADAMW, SAM, NUSAM, Contender("νSAM-Norm", "nusam-norm")),
    baselines=("νSAM", "SAM", "AdamW"),
    models_of_paper=("mixer-s/4", "vit-s/4"),
    notes=(
        "Our text of the paper has no figures of this table; it says that νSAM-Norm improves in certain cases and is "
        "generally dominated by νSAM, of ViT-S/4 and Mixer-S/4.",
    ),
)
