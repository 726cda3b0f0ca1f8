"""Figure 4: Figure 2 for the remaining configurations."""

from nusam.experiments.recipes.fig2 import RadiusSweep

FIGURE = RadiusSweep(
    "fig4",
    "Accuracy over ρ, remaining configurations",
    "as Figure 2 for the configurations that are not shown there; its plots are not in our text. At the small scales "
    "there are no remaining configurations, and the runs are those of Figure 2.",
)
