"""What a share of the batch in the ascent keeps of the gain, and what it costs: one table for each task.

``python benchmarks/kept.py [TASK ...] [--runs FOLDER] [--data-root FOLDER] [--jobs 2]``; the tasks are in ``TASKS``. It
goes on where it was stopped, and puts what has been recorded side by side in ``docs/cheap.md``. Every radius, and the
learning rate of AdamW, is chosen by validation accuracy on seeds that are not reported, and moved by factors of 2 until
the best one has worse neighbours.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from nusam.experiments.runs.contest import interval, mean_and_error
from nusam.experiments.runs.filling import fill
from nusam.experiments.runs.search import Search, carried_out
from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.spec import Recipe, Run
from recording import RESULTS, record

SHARES = {"1": 1.0, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16, "one sample": 1 / 32}
LATE = 0.8  # the share of the steps that AdamW takes alone where the perturbation starts late
ALL = {"nusam": tuple(SHARES), "sam": tuple(SHARES)}
FEW = {"nusam": ("1", "1/8"), "sam": ("1",)}
TUNING, REPORTED = range(100, 102), range(8)  # seeds
COMPARED = ("nusam", "sam")
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "cheap.md"
BEGIN, END = "<!-- what a share keeps, generated -->", "<!-- end of what a share keeps -->"


@dataclass(frozen=True)
class Task:
    """Data, model and recipe; the radii from which the search starts; whether a run takes so long that few rows do."""

    title: str
    data: str
    model: str
    recipe: Recipe
    train_size: int
    radii: dict[str, float]
    is_long: bool = False


TASKS = {
    "digits": Task("Digits, Mixer", "digits", "mixer", Recipe(40), 300, {"nusam": 0.1, "sam": 0.4}),
    "wrong-mixer": Task(
        "Digits with 40% of the labels drawn anew, Mixer",
        "digits",
        "mixer",
        Recipe(40, wrong_labels=0.4),
        600,
        {"nusam": 0.4, "sam": 0.8},
    ),
    "wrong-vit": Task(
        "Digits with 40% of the labels drawn anew, ViT",
        "digits",
        "vit",
        Recipe(40, wrong_labels=0.4),
        600,
        {"nusam": 0.1, "sam": 0.2},
    ),
    "cifar10": Task(
        "CIFAR-10 (JPEG re-encoded), 2,000 images, Mixer",
        "cifar10",
        "mixer",
        Recipe(20, scored_every=4),
        2000,
        {"nusam": 0.1, "sam": 0.4},
    ),
    "minilm": Task(
        "Movie reviews, 512 sentences, MiniLM",
        "movie-reviews",
        "minilm",
        Recipe(3, learning_rate=1e-4, scored_every=3),
        512,
        {"nusam": 0.005, "sam": 0.01},
        is_long=True,
    ),
}


@dataclass
class Bench:
    """Where runs are kept, and how they are made."""

    task: Task
    store: Store
    data_root: Path
    jobs: int

    def cells(self, run: Run, seeds: range, recipe: Recipe) -> list[Cell]:
        """The run with each of the seeds."""
        return [Cell(self.task.data, recipe, replace(run, seed=seed), self.task.train_size) for seed in seeds]

    def fill(self, cells: list[Cell]) -> None:
        """Run what is missing."""
        fill(self.store, cells, self.data_root, self.jobs, "cpu", Console(quiet=True))

    def best(self, searches: list[Search]) -> None:
        """Carry all of the searches to their ends, side by side."""
        carried_out(searches, self.store, self.fill)

    def search(self, start: float, of: Callable[[float], tuple[Run, Recipe]]) -> Search:
        """For the best value of a run or its recipe, over the tuning seeds."""
        return Search(start, lambda value: self.cells(of(value)[0], TUNING, of(value)[1]))


@dataclass
class Row:
    """A line of the table before its runs are made."""

    method: str
    share: str
    start: str
    price: float
    run: Run


def table(bench: Bench) -> list[dict[str, Any]]:
    """AdamW, for as many epochs and for as many seconds; SAM and νSAM at every share, from early on and late."""
    task = bench.task
    alone = Run(task.model, "adamw", 0.0, 0)
    rate = bench.search(task.recipe.learning_rate, lambda rate: (alone, replace(task.recipe, learning_rate=rate)))
    bench.best([rate])
    recipe = replace(task.recipe, learning_rate=rate.found)
    # passes alone, as counted by floating-point operations (benchmarks/shares.py has measured steps)
    work = {method: METHODS[method].ascent_work for method in COMPARED}
    prices = (1 + work["nusam"] / 8, 1 + work["nusam"], 1 + work["sam"])[: 1 if task.is_long else None]
    shares = FEW if task.is_long else ALL
    rows = [Row(f"AdamW, learning rate {rate.found:g}", "–", "–", 1, alone)]
    rows += [Row("AdamW, as many seconds", "–", "–", price, replace(alone, stretch=price)) for price in prices]
    for method, extra in work.items():
        for name in shares[method]:
            run = Run(task.model, method, 0.0, 0, ascent_share=SHARES[name])
            rows.append(Row(METHODS[method].title, name, "10%", 1 + 0.9 * extra * SHARES[name], run))
        for name in ("1/8", "1/16")[: 1 if task.is_long else None] if method == "nusam" else ():
            run = Run(task.model, method, 0.0, 0, ascent_share=SHARES[name], one_pass=True)
            rows.append(Row("νSAM, in one pass", name, "10%", 1 + 0.9 * extra * SHARES[name], run))
        for name in () if task.is_long else ("1", "1/8"):
            run = Run(task.model, method, 0.0, 0, delay=LATE, ascent_share=SHARES[name])
            rows.append(Row(METHODS[method].title, name, f"{LATE:.0%}", 1 + (1 - LATE) * extra * SHARES[name], run))
    searches = [
        bench.search(task.radii[row.run.method], lambda rho, run=row.run: (replace(run, rho=rho), recipe))  # type: ignore[misc]
        for row in rows
        if row.run.method in COMPARED
    ]
    bench.best(searches)
    radii = iter(search.found for search in searches)
    for row in rows:
        if row.run.method in COMPARED:
            row.run = replace(row.run, rho=next(radii))
    bench.fill([cell for row in rows for cell in bench.cells(row.run, REPORTED, recipe)])
    return described(bench, rows, recipe)


def described(bench: Bench, rows: list[Row], recipe: Recipe) -> list[dict[str, Any]]:
    """The rows with what came out."""
    lines: list[dict[str, Any]] = []
    base: list[float] = []
    whole: dict[str, float] = {}
    for row in rows:
        outcomes = [bench.store[cell] for cell in bench.cells(row.run, REPORTED, recipe)]
        last = [100 * outcome.test_accuracy for outcome in outcomes]
        best = [100 * max(outcome.test_accuracies.values()) for outcome in outcomes]
        base = base or last
        differences = [a - b for a, b in zip(last, base, strict=True)]
        if row.share == "1" and row.start == "10%":
            whole[row.method] = fmean(differences)
        gain = whole.get(row.method.split(",")[0], 0.0)
        lines.append(
            {
                "task": bench.task.title,
                "method": row.method,
                "share": row.share,
                "from": row.start,
                "ρ": f"{row.run.rho:g}" if row.run.rho else "–",
                "price": f"{row.price:.3f}",
                "test accuracy": mean_and_error(last),
                "over AdamW": "–" if differences == [0.0] * len(base) else interval(differences),
                "of the whole batch's gain": f"{fmean(differences) / gain:.0%}" if gain > 0 else "",
                "best epoch": f"{fmean(best):.2f}",
            }
        )
    return lines


def recorded() -> list[list[dict[str, Any]]]:
    """The tables of the tasks that have been run to their end."""
    found = [RESULTS / f"kept-{name}-cpu.json" for name in TASKS]
    return [json.loads(file.read_text())["table"] for file in found if file.exists()]


def side_by_side() -> str:
    """Markdown: what each row gains over AdamW on each task, and what a run costs."""
    tables = [{_line(row): row for row in rows} for rows in recorded()]
    titles = [next(iter(rows.values()))["task"] for rows in tables]
    lines = [f"| method | share | from | price | {' | '.join(titles)} |", "| --- " * (4 + len(tables)) + "|"]
    for line in tables[0]:  # a task with all rows
        cells = [_gain(rows[line]) if line in rows else "not run" for rows in tables]
        lines.append(f"| {' | '.join((*line, *cells))} |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What tells a row of a task from its others, whatever AdamW's learning rate."""
    return row["method"].split(", learning rate")[0], row["share"], row["from"], row["price"]


def _gain(row: dict[str, Any]) -> str:
    """Of AdamW alone its accuracy."""
    if row["over AdamW"] == "–":
        return f"{row['test accuracy']} %" if row["price"] == "1.000" else "as many epochs"
    return row["over AdamW"].replace("-", "−")


def write_page() -> None:
    """Put the table into the documentation."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{side_by_side()}\n{END}{rest.split(END)[1]}", "utf-8")


KINDS = {  # how they are drawn
    "AdamW, as many seconds": {"color": "black", "marker": "s"},
    "SAM": {"color": "C0", "marker": "o"},
    "νSAM": {"color": "C3", "marker": "D"},
    "νSAM, in one pass": {"color": "C3", "marker": "D", "markerfacecolor": "white"},
}


def draw(path: Path) -> None:
    """Test error over what a run costs more than AdamW's, a panel for each task that has been recorded."""
    tables = recorded()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "kept", "font.size": 10}):
        columns = min(2, len(tables))
        lines = -(-len(tables) // columns)
        figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained", facecolor="white")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in panels[len(tables) :]:
            axes.set_axis_off()
        for axes, (adamw, *rows) in zip(panels, tables, strict=False):
            mean, error = map(float, adamw["test accuracy"].split(" ± "))
            axes.axhline(100 - mean, color="black", lw=1, label="AdamW")
            axes.axhspan(100 - mean - error, 100 - mean + error, color="black", alpha=0.1, lw=0)
            for kind, style in KINDS.items():
                drawn = [row for row in rows if row["method"] == kind and row["over AdamW"] != "–"]
                late = [row for row in drawn if row["from"] == f"{LATE:.0%}"]
                early = [row for row in drawn if row not in late]
                for own, size, label in ((early, 6, kind), (late, 3.5, f"{kind}, in the last fifth alone")):
                    points(axes, own, {**style, "markersize": size, "label": label})
            axes.set(title=adamw["task"], xlabel="work beyond AdamW's, %", ylabel="test error, %", xscale="log")
            axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        handles, labels = panels[0].get_legend_handles_labels()  # of a task with all rows
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def points(axes: Any, rows: list[dict[str, Any]], style: dict[str, Any]) -> None:
    """One for each row, with its error, and its share beside it."""
    if not rows:
        return
    accuracies = [tuple(map(float, row["test accuracy"].split(" ± "))) for row in rows]
    x, y = [100 * (float(row["price"]) - 1) for row in rows], [100 - mean for mean, _ in accuracies]
    axes.errorbar(x, y, [error for _, error in accuracies], ls="", capsize=2, **style)
    for row, *place in zip(rows, x, y, strict=True):
        if row["share"] != "–":
            axes.annotate(row["share"].replace("one sample", "1/32"), place, (4, 4), textcoords="offset points", size=7)


def known(name: str) -> str:
    """A task's name."""
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"needs one of {', '.join(TASKS)}, got {name}")
    return name


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tasks", nargs="*", type=known, metavar="TASK", help=", ".join(TASKS))
    arguments.add_argument("--runs", type=Path, default=RESULTS / "kept")
    arguments.add_argument("--data-root", type=Path, default=Path("data"))
    arguments.add_argument("--jobs", type=int, default=2)
    options = arguments.parse_args()
    for name in options.tasks:
        bench = Bench(TASKS[name], Store(options.runs), options.data_root, options.jobs)
        record(
            f"kept-{name}",
            "cpu",
            table(bench),
            f"{len(REPORTED)} seeds, each with its own split, order and initial weights, the same for all rows; test "
            "accuracy in % after the last epoch, ± standard error; over AdamW: paired by seed, with its 95% interval. "
            f"ρ, and AdamW's learning rate, were chosen by validation accuracy on {len(TUNING)} other seeds, moved by "
            "factors of 2 until the best one had worse neighbours; SAM and νSAM take AdamW's learning rate. Price: "
            "floating-point operations of the whole run over AdamW's. AdamW for as many seconds runs so many times as "
            "many epochs. From: where in training the perturbation starts.",
        )
    draw(DOCS / "results" / "kept.svg")
    write_page()


if __name__ == "__main__":
    main()
