"""Table 10: the number of power iterations."""

from nusam.experiments.recipes.method_table import ADAMW, NUSAM, MethodTable
from nusam.experiments.runs.contest import Contender

TABLE = MethodTable(
    name="table10",
    title="The number of power iterations",
    contenders=(
        ADAMW,
        NUSAM,
        *(Contender(f"νSAM, T={T}", "nusam", {"power_iterations": T}, radius_of="νSAM") for T in (2, 5, 20)),
    ),
    baselines=("νSAM", "AdamW"),
    notes=(
        "Our text of the paper has no figures of this table, nor its T, models and data; it says that more iterations "
        "do not necessarily help. ρ is the one chosen for T = 1.",
    ),
)
