"""Figure 5: accuracy over ρ in fine-tuning."""

from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.recipes.fig2 import RadiusSweep
from nusam.experiments.recipes.fine_tuning import (
    ONE_SET,
    PUBLISHED,
    fine_tuning_data,
    fine_tuning_ours,
    fine_tuning_settings,
)
from nusam.experiments.runs.contest import Setting


class FineTuningSweep(RadiusSweep):
    """From pretrained weights."""

    def data(self, scale: str) -> tuple[str, ...]:
        """What is fine-tuned on."""
        return fine_tuning_data(scale)

    def ours(self, scale: str) -> str:
        """Where the weights come from."""
        return fine_tuning_ours(scale)

    def settings(self, bench: Bench) -> list[Setting]:
        """Pretrain what has not been."""
        return fine_tuning_settings(bench)


FIGURE = FineTuningSweep(
    "fig5",
    "Accuracy over ρ in fine-tuning",
    "a sweep over ρ for the results of Table 4; its plots are not in our text.",
    notes=(ONE_SET,),
    published=PUBLISHED,
    needs="Fashion-MNIST at the cpu scale, pretrained weights at the full one",
)
