"""The committed runs are of one piece: what must be the same in two of them is."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from nusam.experiments.runs.store import Cell, Store
from nusam.experiments.training.spec import Recipe, Run

FOLDER = Path(__file__).parents[2] / "docs" / "results"
ROWS = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text("utf-8").splitlines()]
RUNS = {
    Cell(**{**row["cell"], "recipe": Recipe(**row["cell"]["recipe"]), "run": Run(**row["cell"]["run"])}): row
    for row in ROWS
}


def _base(cell):
    """The same run by the base optimizer alone."""
    return replace(cell, run=replace(cell.run, method="adamw", rho=0.0, delay=None, power_iterations=1))


def test_every_row_has_the_key_of_its_cell():
    assert [cell.key for cell in RUNS] == [row["key"] for row in ROWS]


def test_before_its_delay_a_run_is_that_of_the_base_optimizer():
    """It would not be if it started from other weights, or saw other images."""
    compared = defaultdict(int)
    for cell, row in RUNS.items():
        base = RUNS.get(_base(cell))
        if base is None or base is row:
            continue
        steps_per_epoch = -(-cell.train_size // cell.recipe.batch_size)
        alone = row["delay_steps"] // steps_per_epoch
        assert row["epochs"][:alone] == base["epochs"][:alone], cell
        compared[cell.data] += alone > 0
    assert compared.keys() >= {"digits", "digits-28"}
    assert all(compared[data] >= 12 for data in ("digits", "digits-28"))


def test_fine_tuned_models_start_from_one_set_of_weights_each():
    weights = defaultdict(set)
    for cell in RUNS:
        if cell.pretrained:
            weights[cell.run.model].add(cell.pretrained)
    assert {model: len(names) for model, names in weights.items()} == {"mixer": 1, "vit": 1}
    assert all("-" in name for names in weights.values() for name in names)


def test_the_store_reads_them_all(tmp_path):
    (tmp_path / "runs.jsonl").write_bytes((FOLDER / "runs.jsonl").read_bytes())
    assert len(Store(tmp_path)) == len(ROWS)
