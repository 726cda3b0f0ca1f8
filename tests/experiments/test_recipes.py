"""What the recipes put beside our figures, and call ours: without training, from a store of made-up outcomes."""

import re

import pytest
import torch
from rich.console import Console

from nusam.experiments.commands.reproduce import experiment as recipe_of
from nusam.experiments.recipes import experiment
from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.runs.store import Store
from nusam.experiments.training import data
from nusam.experiments.training.spec import Epoch, Outcome


@pytest.fixture
def result_of(tmp_path, monkeypatch):
    """What a recipe comes to, and the cells that it asked for."""
    asked = []

    def made_up(store, cells, *_, **__):
        for cell in cells:
            asked.append(cell)
            if cell not in store:
                accuracy = (7 * len(cell.run.method) + cell.run.seed) % 50 / 50
                store.add(cell, Outcome(cell.run, [Epoch(1.0, accuracy)], accuracy, 0, 1, 0.1), torch.device("cpu"))

    monkeypatch.setattr(experiment, "fill", made_up)
    monkeypatch.setattr(experiment, "load", lambda *_: data.load("digits", tmp_path))  # for the title of CIFAR-10

    def run(name, scale, of):
        asked.clear()
        bench = Bench(Store(tmp_path), scale, of, tmp_path, 1, torch.device("cpu"), Console())
        return recipe_of(name).run(bench), list(asked)

    return run


def _paper(result):
    (column,) = (column for column in result.columns if column.startswith("paper"))
    return {(row["model"], row["method"]): row[column] for row in result.rows}


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("table2", {("Mixer-B/4", "νSAM"): "70.09", ("ViT-S/4", "SAM-ON"): "72.70"}),
        ("table3", {("Mixer-S/4", "AdamW"): "59.09", ("ViT-S/4", "SAM"): "65.11"}),
        ("table4", {("Mixer-B/16", "νSAM"): "86.88 ± 0.25", ("ViT-S/16", "AdamW"): "91.10 ± 0.12"}),
    ],
)
def test_beside_cifar100_stand_the_papers_cells_of_cifar100(result_of, name, cells):
    result, _ = result_of(name, "full", "cifar100")
    assert cells.items() <= _paper(result).items()
    assert "not in our text" not in _paper(result).values()
    assert "CIFAR-10)" not in result.findings
    assert not any("has no cells" in note for note in result.notes)


def test_the_papers_difference_is_that_of_its_data(result_of):
    result, _ = result_of("table2", "full", "cifar100")
    (line,) = (line for line in result.findings.splitlines() if line.startswith("- ViT-S/4: νSAM − SAM "))
    assert "paper (ViT-S/4, CIFAR-100): -1.11" in line  # as Table 2 prints it


def test_data_without_cells_get_those_of_cifar10_and_say_so(result_of):
    result, _ = result_of("table3", "cpu", "digits")
    assert _paper(result)["Mixer", "νSAM"] == "88.55"
    assert any(
        note.startswith(
            "The paper has no cells for these data and models: beside Mixer stand those of Mixer-S/4 on CIFAR-10"
        )
        for note in result.notes
    )
    result, _ = result_of("table3", "cpu", "cifar10")
    assert any(note.startswith("The paper has no cells for these models: beside Mixer stand ") for note in result.notes)


def test_the_papers_best_iterates_are_called_so(result_of):
    result, _ = result_of("table2", "full", "cifar100")
    assert "paper, best iterate" in result.columns
    assert any("differences and verdicts here are of the last" in note for note in result.notes)


def test_the_cells_of_table_3_are_not_called_best_iterates(result_of):
    for scale, of in (("cpu", "digits"), ("full", "cifar100")):
        result, _ = result_of("table3", scale, of)
        assert "paper" in result.columns
        assert not any("best iterate" in column for column in result.columns if column.startswith("paper"))
        assert any(note.startswith("The paper says of Table 2 that its cells are of the best") for note in result.notes)


def test_glue_is_fine_tuned_as_geiping_and_goldstein_do(result_of):
    assert len(recipe_of("table5").data("full")) == 8
    result, asked = result_of("table5", "full", "glue-stsb")
    recipes = {cell.recipe for cell in asked}
    assert {(r.epochs, r.beta2, r.batch_size, r.learning_rate, r.warm_up) for r in recipes} == {
        (5, 0.98, 32, 4e-5, 0.1)
    }
    assert {curve.y_title for curve in result.curves} == {"mean of Pearson's and Spearman's correlation × 100"}
    assert {curve.y_title for curve in result_of("table5", "full", "glue-cola")[0].curves} == {
        "Matthews correlation × 100"
    }


@pytest.mark.parametrize(("name", "says"), [("table2", True), ("fig3", True), ("table4", False), ("table13", False)])
def test_what_differs_from_the_recipe_it_is_after_is_listed(result_of, pretrained, name, says):
    result, _ = result_of(name, "full", "cifar10")
    notes = [note for note in result.notes if note.startswith("Gani et al.")]
    assert len(notes) == says
    assert all(words in notes[0] for words in ("100 epochs", "label smoothing", "CutMix") if says)


def test_what_is_selected_by_looking_and_of_one_set_of_weights_says_so(result_of, pretrained):
    for name, of in (("table3", "digits"), ("fig2", "digits"), ("fig3", "digits")):
        assert any("selected by looking" in note for note in result_of(name, "cpu", of)[0].notes)
    for name in ("table4", "fig5"):
        assert any("one set of pretrained weights" in note for note in result_of(name, "cpu", "digits-28")[0].notes)


def test_a_verdict_needs_a_bracketed_radius(result_of):
    """Validation is the same for every ρ here, so that the smallest is taken."""
    findings = result_of("table3", "cpu", "digits")[0].findings.splitlines()
    with_paper = [line for line in findings if "; paper (" in line]
    assert len(with_paper) == 10
    assert all(line.endswith("not bracketed.") for line in with_paper)
    assert "Holm's procedure at 5% for all 10 differences" in findings[-1]


def _ours(result):
    (note,) = (note for note in result.notes if note.startswith("Ours: "))
    return note


@pytest.mark.parametrize(
    ("name", "scale", "of", "ours", "not_ours"),
    [
        (
            "table4",
            "cpu",
            "digits-28",
            ["learning rate 0.001", "batch size 32", "no warm-up", "no augmentation"],
            ["epochs,", "weight decay"],
        ),
        ("table4", "full", "cifar100", ["batch size 128"], ["learning rate", "10 epochs", "seeds,", "Gani"]),
        ("fig5", "cpu", "digits-28", ["learning rate 0.001", "none is chosen"], ["0.004", "validation accuracy"]),
        ("table3", "cpu", "digits", ["40 epochs", "2 seeds that are not reported, by factors of 2"], ["learning"]),
        (
            "table2",
            "full",
            "cifar100",
            ["300 epochs", "weight decay 0.05", "after Gani"],
            ["AutoAugment"],
        ),
        ("fig2", "cpu", "digits", ["none is chosen", "no augmentation"], ["validation accuracy"]),
        ("fig3", "cpu", "digits", ["40 epochs", "2 seeds that are not reported"], []),
        ("fig3", "full", "cifar10", ["2 seeds that are not reported"], ["epochs", "3 seeds,"]),
        ("table5", "cpu", "movie-reviews", ["learning rate 0.0001", "3 epochs"], ["batch size", "candidates"]),
        ("table5", "full", "glue-cola", ["choice of ρ"], ["epochs", "β₂", "weight decay", "accuracy)", "candidates"]),
        ("table13", "full", "cifar100", ["batch size 128"], ["candidates", "validation accuracy"]),
    ],
)
def test_what_is_called_ours_is_what_was_run_and_the_paper_does_not_give(
    result_of, pretrained, name, scale, of, ours, not_ours
):
    note = _ours(result_of(name, scale, of)[0])
    for words in ours:
        assert words in note
    for words in not_ours:
        assert words not in note


@pytest.fixture
def pretrained(monkeypatch):
    """As if weights had been trained."""
    monkeypatch.setattr("nusam.experiments.recipes.fine_tuning._pretrained", lambda *_: "")


@pytest.mark.parametrize(
    ("name", "models", "of"),
    [
        ("table2", {"mixer-b/4", "mixer-s/4", "vit-b/4", "vit-s/4"}, ("cifar10", "cifar100")),
        ("table3", {"mixer-s/4", "vit-s/4"}, ("cifar10", "cifar100")),
        ("table4", {"mixer-b/16", "vit-b/16", "vit-s/16"}, ("cifar10", "cifar100")),
        ("table8", {"mixer-s/4", "vit-s/4"}, ("cifar10", "cifar100")),
        ("table13", {"mixer-b/16", "vit-b/16", "vit-s/16"}, ("cifar10", "cifar100")),
        ("fig3", {"vit-s/4"}, ("cifar10",)),
    ],
)
def test_at_full_scale_models_and_data_are_the_papers(result_of, name, models, of):
    assert recipe_of(name).data("full") == of
    _, asked = result_of(name, "full", of[-1])
    assert {cell.run.model for cell in asked} == models


def test_table_13_fine_tunes_at_the_papers_rate_and_radii(result_of):
    _, asked = result_of("table13", "full", "cifar100")
    runs = {
        (c.run.method, c.run.rho, c.recipe.learning_rate * c.run.rate, c.recipe.epochs * c.run.stretch) for c in asked
    }
    assert runs == {
        ("adamw", 0.0, 1e-4, 10.0),
        ("adamw", 0.0, 5e-5, 10.0),
        ("adamw", 0.0, 1e-4, 20.0),
        ("sam", 0.05, 5e-5, 10.0),
        ("nusam", 0.02, 5e-5, 10.0),
    }


def test_a_learning_rate_that_was_searched_for_is_said_of_each_model(result_of):
    """Validation is the same for every rate here, so that the search stops at the smallest."""
    result, asked = result_of("table3", "cpu", "digits")
    (note,) = (note for note in result.notes if note.startswith("Learning rate"))
    assert note.endswith(": 0.000125 for Mixer, 0.000125 for ViT.")
    of_adamw = {(cell.run.seed, cell.recipe.learning_rate) for cell in asked if cell.run.method == "adamw"}
    assert {(seed, 4e-3 / 2**k) for seed in (100, 101) for k in range(-1, 6)} <= of_adamw
    assert {rate for seed, rate in of_adamw if seed < 100} == {4e-3 / 32}


def test_a_result_says_how_many_seeds_and_examples_it_is_of(result_of):
    circumstances = result_of("table3", "cpu", "digits")[0].circumstances
    assert (circumstances["seeds"], circumstances["tuning_seeds"], circumstances["train_size"]) == (8, [100, 101], 300)


@pytest.mark.parametrize("name", ["fig2", "fig4"])
def test_the_sweeps_say_that_their_images_are_not_cropped(result_of, name):
    result, asked = result_of(name, "cpu", "digits")
    assert {cell.recipe.augment for cell in asked} == {"none"}
    assert any(re.search("without random crops.*Table 3", note) for note in result.notes)
