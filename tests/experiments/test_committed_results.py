"""The committed results are what their recipes make of the committed runs, without a run more."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nusam.experiments.commands.reproduce import experiment as recipe_of
from nusam.experiments.pages.result import read_all
from nusam.experiments.recipes import experiment, fine_tuning
from nusam.experiments.recipes.demo import Demo
from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.runs.store import Store
from nusam.experiments.training import step_time
from nusam.experiments.training.data import load
from nusam.experiments.training.spec import Recipe

FOLDER = Path(__file__).parents[2] / "docs" / "results"
ROWS = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text("utf-8").splitlines()]
WITHOUT_RUNS = ("table1", "table14", "fig1")
RESULTS = [result for result in read_all(FOLDER) if result.name not in WITHOUT_RUNS]
OF_THE_CPU_SCALE = [
    result for result in read_all(FOLDER) if result.scale == "cpu" and result.name not in ("table1", "fig1")
]


def rendered(result, folder, monkeypatch):
    """The same result from the committed runs."""
    shutil.copy(FOLDER / "runs.jsonl", folder)
    pretrained = {row["cell"]["run"]["model"]: row["cell"]["pretrained"] for row in ROWS if row["cell"]["pretrained"]}

    def nothing_is_run(store, cells, *_, **__):
        assert all(cell in store for cell in cells)

    monkeypatch.setattr(experiment, "fill", nothing_is_run)
    monkeypatch.setattr(experiment, "load", lambda *_: load("digits", folder))  # for the title of CIFAR-10's files
    monkeypatch.setattr(fine_tuning, "_pretrained", lambda bench, tuning, model: pretrained[model])
    monkeypatch.setattr(step_time, "step_seconds", lambda runs, *_: dict.fromkeys(runs, 1.0))  # of the demo
    bench = Bench(Store(folder), result.scale, result.data, folder, 1, torch.device("cpu"), Console(quiet=True))
    if result.name == "demo":
        made_of = result.circumstances
        demo = Demo(result.data, Recipe(**made_of["recipe"]), made_of["seeds"], made_of["train_size"])
        return demo.run(bench, load(result.data, folder, made_of["train_size"]))
    return recipe_of(result.name).run(bench)


@pytest.mark.parametrize("committed", RESULTS, ids=lambda result: result.file_name)
def test_a_committed_result_is_made_of_the_committed_runs(committed, tmp_path, monkeypatch):
    made = json.loads(json.dumps(asdict(rendered(committed, tmp_path, monkeypatch))))
    written = asdict(committed)
    of_files = "Data: "  # which are not at hand
    for result in (made, written):
        result["notes"] = [note for note in result["notes"] if not note.startswith(of_files)]
        result["rows"] = [{name: cell for name, cell in row.items() if name != "time"} for row in result["rows"]]
    for field in ("title", "columns", "rows", "curves", "findings", "notes"):
        assert made[field] == written[field], field
    recipes = [
        Recipe(**result["circumstances"].pop("recipe")) for result in (made, written)
    ]  # what is newer: its default
    assert recipes[0] == recipes[1]
    assert made["circumstances"].items() <= written["circumstances"].items()


@pytest.mark.parametrize("committed", OF_THE_CPU_SCALE, ids=lambda result: result.file_name)
def test_the_models_are_those_that_the_paper_has(committed):
    """No Mixer with a convolution as stem, and no ViT without a class token, unless it is called so."""
    models = {row["cell"]["run"]["model"] for row in ROWS}
    assert not models & {"mixer-conv", "vit-mean"}
    shown = " ".join([*(row.get("model", "") for row in committed.rows), *(curve.panel for curve in committed.curves)])
    assert "convolution as stem" not in shown
    assert "no class token" not in shown


def test_there_are_such_results():
    assert len(OF_THE_CPU_SCALE) >= 12
