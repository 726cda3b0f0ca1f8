"""Table 9: SAM-ON with a delay."""

from nusam.experiments.recipes.method_table import ADAMW, SAM_ON, MethodTable
from nusam.experiments.runs.contest import Contender

TABLE = MethodTable(
    name="table9",
    title="SAM-ON with perturbation delay",
    contenders=(ADAMW, SAM_ON, Contender("SAM-ON, delay 10%", "sam-on", {"delay": 0.1})),
    baselines=("SAM-ON", "AdamW"),
    notes=(
        "Our text of the paper has no figures of this table, nor its models and data; it says that the delay does not "
        "improve SAM-ON.",
    ),
)
