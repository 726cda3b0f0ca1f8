"""Table 1: floats of the perturbation."""

from nusam.experiments.experiment import Bench, Experiment
from nusam.experiments.result import Result


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
        from nusam.experiments.table1 import table1

        return table1(bench.scale_name)


TABLE = Table1()
