"""The recipes of docs/frameworks.md run, each with its framework, and the versions on the page are those tested."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import TensorDataset
from transformers import TrainingArguments

import nusam
from tests.contract.problem import Run, data
from tests.contract.transformers_loop import NetWithLoss

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^```python title=\"(.*?)\"\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))

FURTHER = {f"{title}, one pass": title for title in ("Lightning", "Trainer", "accelerate")}  # what comes before each


def scope(title, folder):
    """What a reader has at hand: a model, a criterion, and data in the framework's form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator)
    dataset = TensorDataset(x, x[:, :4].argmax(1))
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    known = {"torch": torch, "nusam": nusam, "criterion": nn.CrossEntropyLoss()}
    if title == "Trainer":
        model = NetWithLoss()
        known["arguments"] = TrainingArguments(
            output_dir=str(folder), use_cpu=True, num_train_epochs=2, logging_steps=1, report_to="none"
        )
        dataset = [{"x": image, "labels": label} for image, label in data(Run())]
    if title == "TensorBoard":
        known["opt"] = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-3), model=model)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8)
    return {**known, "model": model, "dataset": dataset, "loader": loader}


def test_every_block_of_code_is_a_recipe():
    assert [title for title in RECIPES if title not in FURTHER] == [
        "Lightning", "Fabric", "Trainer", "accelerate", "TensorBoard",
    ]  # fmt: skip
    assert list(FURTHER) == [title for title in RECIPES if title in FURTHER]
    assert PAGE.count("```python") == len(RECIPES)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*num_workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:The number of training batches")  # likewise
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # accelerate asks for it on a CPU too
@pytest.mark.parametrize("title", [title for title in RECIPES if title not in FURTHER])
def test_a_recipe_trains_with_a_perturbation(title, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(nusam, "NuSAM", type("NuSAM", (nusam.NuSAM,), {"__init__": noting(made)}))
    known = scope(title, tmp_path)
    before = [parameter.detach().clone() for parameter in known["model"].parameters()]
    exec(RECIPES[title], known)
    after = list(known["model"].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (opt,) = made
    assert opt._progress.ascents > 0
    if title == "Trainer":
        logged = known["trainer"].state.log_history
        assert {"loss", "active", "sharpness_gap", "epsilon/layers.0.weight"} <= logged[-2].keys()
        assert known["trainer"].optimizer.optimizer.delay == 2


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("title", FURTHER)
def test_a_recipe_goes_on_in_one_pass(title, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(nusam, "NuSAM", type("NuSAM", (nusam.NuSAM,), {"__init__": noting(made)}))
    known = scope(FURTHER[title], tmp_path)
    exec(RECIPES[FURTHER[title]], known)
    before = [parameter.detach().clone() for parameter in known["model"].parameters()]
    exec(RECIPES[title], known)
    assert not any(torch.equal(a, b) for a, b in zip(before, known["model"].parameters(), strict=True))
    assert made[-1]._one_pass._looked_at


def noting(made):
    initialize = nusam.NuSAM.__init__

    def wrapper(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        made.append(self)

    return wrapper


@pytest.mark.parametrize("package", ["pytorch-lightning", "transformers", "accelerate"])
def test_the_versions_are_those_tested(package):
    pinned = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert f"{package} {pinned}" in PAGE
