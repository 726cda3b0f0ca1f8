"""Table 14: time."""

from dataclasses import replace

from nusam.experiments.pages.result import Result
from nusam.experiments.recipes.experiment import Bench, Experiment
from nusam.experiments.training.data import load
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import TITLES
from nusam.experiments.training.spec import Run

_METHODS = ("adamw", "sam", "sam-on", "nusam", "nusam-norm")


class Table14(Experiment):
    """Seconds of a step, the methods taking turns in one process."""

    name = "table14"
    title = "Time of a step"
    needs = ""
    takes = {"smoke": "10 s", "cpu": "1 min", "full": "10 min of a GPU"}  # noqa: RUF012
    notes = (
        "Our text of the paper has no figures of this table; it says that νSAM costs what SAM costs. Ours are "
        "ratios in one run, after the delay, with ρ = 0.01.",
    )

    def run(self, bench: Bench) -> Result:
        """Measure."""
        source = load(bench.data, bench.data_root, bench.scale.train_size[bench.data], bench.download)
        import torch

        from nusam.experiments.training.step_time import step_seconds

        size = bench.scale.recipes[bench.data].batch_size
        rows = []
        for model in self.models(bench.scale_name):
            runs = {method: Run(model, method, 0.01, 0) for method in _METHODS}
            seconds = step_seconds(runs, source, size, bench.device)
            for method in _METHODS:
                rows.append(
                    {
                        "model": TITLES[model],
                        "method": METHODS[method].title,
                        "ms a step": f"{1000 * seconds[method]:.2f}",
                        "over AdamW": f"{seconds[method] / seconds['adamw']:.2f}",
                        "over SAM": f"{seconds[method] / seconds['sam']:.2f}",
                    }
                )
        findings = "\n".join(
            f"- {row['model']}: a step of νSAM takes {row['over SAM']} of SAM's, {row['over AdamW']} of AdamW's."
            for row in rows
            if row["method"] == "νSAM"
        )
        findings += f"\n\nMedians on {torch.get_num_threads()} threads of which one is used; small models, small gains."
        result = bench.result(self, self.title, list(rows[0]), rows, findings=findings)
        return replace(result, circumstances={"batch size": size})

    def ours(self, scale: str) -> str:
        """No recipe: nothing is trained."""
        return ", ".join(filter(None, ["" if scale == "full" else super().ours(scale), "the batch size"]))


TABLE = Table14()
