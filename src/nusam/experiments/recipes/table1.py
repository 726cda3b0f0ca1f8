"""Table 1: floats of the perturbation."""

from nusam.experiments.pages.result import Result
from nusam.experiments.recipes.experiment import Bench, Experiment


class Table1(Experiment):
    """Counted on the meta device."""

    name = "table1"
    title = "What the perturbation costs"
    needs = ""
    takes = {"smoke": "5 s", "cpu": "10 s", "full": "10 s"}  # noqa: RUF012

    def data(self, scale: str) -> tuple[str, ...]:
        """None."""
        return ("",)

    def run(self, bench: Bench) -> Result:
        """Count."""
        from nusam.experiments.recipes.perturbation_costs import table1

        return table1(bench.scale_name)


TABLE = Table1()
