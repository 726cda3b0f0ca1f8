"""The table's numbers, and results.json around awkward ones."""

import json
import math

import pytest
from rich.console import Console

from nusam.experiments import files
from nusam.experiments.pages import results
from nusam.experiments.pages.figures import learning_curves
from nusam.experiments.pages.table import rendered, rows
from nusam.experiments.runs.rho_selection import Contest, Plan
from nusam.experiments.training.spec import Epoch, Outcome, Run


def plan_of(accuracies: dict[str, list[float]], loss: float = 0.5) -> Plan:
    """A plan for the ViT in which each method's runs ended with these test accuracies."""
    plan = Plan({Contest("vit", m): (0.0 if m == "adamw" else 0.1,) for m in accuracies}, seeds=3, trial_seeds=2)
    for method, finals in accuracies.items():
        for seed, final in enumerate(finals):
            run = Run("vit", method, 0.0 if method == "adamw" else 0.1, seed)
            plan.add(Outcome(run, [Epoch(2.3, 0.1), Epoch(loss, final)], 0.5, 1, 7, 0.1))
    return plan


def test_means_standard_errors_and_paired_gains():
    adamw, nusam = rows(plan_of({"adamw": [0.8, 0.7, 0.9], "nusam": [0.82, 0.74, 0.93]}), 10, {})
    assert adamw.test_accuracy == pytest.approx(0.8)
    assert adamw.test_accuracy_se == pytest.approx(0.1 / math.sqrt(3))
    assert adamw.gain is None
    assert nusam.gain == pytest.approx(0.03)
    assert nusam.gain_se == pytest.approx(0.01 / math.sqrt(3))


def test_gains_are_over_the_seeds_that_both_finished():
    plan = plan_of({"adamw": [0.8], "nusam": [0.9, 0.1, 0.1]})
    row = rows(plan, 10, {})[1]
    assert row.gain == pytest.approx(0.1)
    assert row.gain_se is None
    assert row.seeds == 3


def test_methods_without_a_finished_run_have_no_row():
    assert [row.method for row in rows(plan_of({"adamw": [0.8], "nusam": []}), 10, {})] == ["adamw"]


def test_collapsed_runs_show():
    table = rows(plan_of({"nusam": [0.8, 0.1, 0.11]}), 10, {"vit": {"adamw": 0.01, "nusam": 0.02}})
    assert table[0].collapsed == 2
    console = Console(width=80, record=True)
    console.print(rendered(table, "title", "caption"))
    line = next(line for line in console.export_text().splitlines() if "νSAM" in line)
    assert "!" in line
    assert "2.00×" in line


def test_results_and_figure_survive_a_diverged_run(tmp_path):
    plan = plan_of({"adamw": [0.8, 0.7], "nusam": [0.1]}, loss=math.nan)
    results.write(tmp_path / "results.json", {"options": {"out": tmp_path}}, plan, rows(plan, 10, {}))
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["runs"][0]["train_loss"] == [2.3, None]
    learning_curves(plan, "title", tmp_path / "demo.png")


def test_an_interrupted_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    plan = plan_of({"adamw": [0.8]})
    results.write(path, {}, plan, [])
    before = path.read_text(encoding="utf-8")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, {}, plan_of({"adamw": [0.8, 0.9]}), [])
    assert path.read_text(encoding="utf-8") == before
