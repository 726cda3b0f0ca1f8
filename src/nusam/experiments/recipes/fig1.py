"""Figure 1: the direction of the perturbation is what makes it converge."""

from dataclasses import replace

from nusam.experiments.pages.result import Result
from nusam.experiments.recipes.convergence import fig1
from nusam.experiments.recipes.experiment import Bench, Experiment


class Figure1(Experiment):
    """Gradient descent, SAM, νSAM and GaussSAM on a quadratic."""

    name = "fig1"
    title = "Convergence on a quadratic with steps c/k"
    needs = ""
    takes = {"smoke": "1 s", "cpu": "20 s", "full": "20 s"}  # noqa: RUF012

    def data(self, scale: str) -> tuple[str, ...]:
        """None."""
        return ("",)

    def run(self, bench: Bench) -> Result:
        """Simulate."""
        steps, seeds = (1_000, 2) if bench.scale_name == "smoke" else (100_000, 10)
        return replace(
            fig1(steps, seeds, scale=bench.scale_name), circumstances={"steps": f"{steps:,}", "seeds": seeds}
        )


FIGURE = Figure1()
