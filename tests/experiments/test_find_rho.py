"""nusam find-rho, from the command line."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nusam
from nusam.experiments.commands.main import main
from nusam.experiments.commands.setups import imported
from nusam.experiments.pages.radius_figure import draw
from nusam.tools.radius_search import RadiusSearch, Trial
from nusam.tools.verdict import Verdict

SETUP = """
import torch
from torch import nn

def setup():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    batches = list(zip(x.split(8), x[:, :3].argmax(1).split(8)))
    return {
        "model": nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        "base": lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        "loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "loader": batches[:6],
        "validation": batches[6:],
    }

def diverging():
    return {**setup(), "base": lambda model: torch.optim.SGD(model.parameters(), lr=1e30)}

def adadelta():
    return {**setup(), "base": lambda model: torch.optim.Adadelta(model.parameters())}

def failing():
    return {**setup(), "loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1][:3])}

def once():
    return {**setup(), "loader": iter(setup()["loader"])}

def asking(size):
    return setup()

def incomplete():
    return {"model": nn.Linear(1, 1)}

number = 3
"""


def find_rho(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nusam", "find-rho", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def setup(tmp_path):
    (tmp_path / "training.py").write_text(SETUP)
    return f"{tmp_path / 'training.py'}:setup"


def test_a_setup_of_ones_own(setup, tmp_path, monkeypatch, capsys):
    options = ("--steps", 40, "--seeds", 2, "--rhos", 0.05, 0.2, "--out", tmp_path / "out")
    assert find_rho(monkeypatch, setup, *options) == 0
    said = capsys.readouterr().out
    assert "NuSAM, ρ = 0.05" in said
    recorded = json.loads((tmp_path / "out" / "rho.json").read_text())
    assert recorded["suggestions"].keys() == {"NuSAM", "SAM"}
    assert [(t["method"], t["rho"]) for t in recorded["trials"]] == [
        ("base optimizer", 0.0),
        ("NuSAM", 0.05),
        ("NuSAM", 0.2),
        ("SAM", 0.05),
        ("SAM", 0.2),
    ]
    assert (tmp_path / "out" / "rho.png").read_bytes().startswith(b"\x89PNG")


IN_A_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Row:
    number: int = 3

    @dataclass
    class Inner:
        row: Row | None = None

def row():
    return Row.Inner(Row(4))
"""


@pytest.mark.parametrize(
    "name", ["training.py", "random.py", "nusam.py", "pickle.py", "my set-up v1.2.py", "größe 50%.py"]
)
def test_what_a_file_defines_is_found_by_other_processes_and_shadows_nothing(name, tmp_path):
    """As dataclasses look for their annotations, and loader workers that are spawned for what they are handed."""
    known = {name: module for name, module in sys.modules.items() if "setups" not in name}
    (tmp_path / name).write_text(IN_A_FILE)
    module = imported(tmp_path / name)
    assert sys.modules[module.__name__] is module
    assert known.items() <= sys.modules.items()
    pickled = pickle.dumps(module.row())
    assert pickle.loads(pickled) == module.row()
    read = (
        "import pickle, sys; found = pickle.load(sys.stdin.buffer); print(found.row.number, type(found).__qualname__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(nusam.__file__).parents[1])}
    other = subprocess.run(
        [sys.executable, "-c", read], input=pickled, env=environment, cwd="/", check=True, capture_output=True
    )
    assert other.stdout.split() == [b"4", b"Row.Inner"]
    (tmp_path / name).write_text(IN_A_FILE.replace("Row(4)", "Row(55)"))
    assert imported(tmp_path / name).row().row.number == 55


def test_a_set_up_of_dataclasses_whose_annotations_are_put_off(tmp_path, monkeypatch):
    head = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Configuration:
    width: int = 16
"""
    (tmp_path / "random.py").write_text(
        head + SETUP.replace("setup():", "setup(given: Configuration = Configuration()):")
    )
    options = ("--steps", 2, "--seeds", 1, "--rhos", 0.05, "--methods", "nusam", "--out", tmp_path / "out")
    assert find_rho(monkeypatch, f"{tmp_path / 'random.py'}:setup", *options) == 0


def test_the_documented_file_and_command(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "choosing-rho.md").read_text()
    (code,) = re.findall(r"^```python title=\"search.py\"\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^nusam find-rho (.*)$", page, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("search.py").write_text(code)
    assert find_rho(monkeypatch, *command.split()) == 0
    trials = json.loads(Path("runs/find-rho/rho.json").read_text())["trials"]
    assert len(trials) == 7


def test_the_embedded_data(tmp_path, monkeypatch, capsys):
    options = ("--steps", 5, "--seeds", 1, "--rhos", 0.1, "--methods", "sam-on", "--out", tmp_path)
    assert find_rho(monkeypatch, *options) == 0
    assert "SAMON" in capsys.readouterr().out


def test_one_pass_reaches_the_search(setup, tmp_path, monkeypatch):
    options = (
        "--steps",
        8,
        "--seeds",
        1,
        "--rhos",
        0.1,
        "--methods",
        "nusam",
        "--ascent-share",
        0.5,
        "--out",
        tmp_path,
    )
    scores = []
    for more in ((), ("--one-pass",)):
        assert find_rho(monkeypatch, setup, *options, *more) == 0
        scores.append([trial["scores"] for trial in json.loads((tmp_path / "rho.json").read_text())["trials"]])
    assert scores[0][0] == scores[1][0]
    assert scores[0][1] != scores[1][1]


def test_a_diverged_trial_has_a_place_in_table_and_figure(tmp_path):
    trials = (Trial("NuSAM", 0.1, (-0.5, -0.4)), Trial("NuSAM", 9.0, (-0.6, -float("inf"))))
    draw(RadiusSearch(Trial("base optimizer", 0.0, (-0.7, -0.6)), trials), tmp_path / "rho.png")
    assert (tmp_path / "rho.png").stat().st_size > 5_000


def test_if_everything_diverges_the_scores_are_kept_and_the_table_says_so(setup, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ("--steps", 3, "--seeds", 1, "--rhos", 0.1, 0.2, "--methods", "nusam", "--out", out)
    assert find_rho(monkeypatch, setup.replace(":setup", ":diverging"), *options) == 0
    assert "lower the learning rate" in " ".join(capsys.readouterr().out.split())
    recorded = json.loads((out / "rho.json").read_text())
    assert [trial["scores"] for trial in recorded["trials"]] == [[None]] * 3
    assert (out / "rho.png").stat().st_size > 5_000


def test_an_error_in_the_users_own_loss_keeps_its_place(setup, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nusam", "find-rho", setup.replace(":setup", ":failing"), "--steps", "1"])
    with pytest.raises(ValueError, match="batch_size"):
        main()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.py:setup",), "SETUP must be FILE.py:FUNCTION with a file that exists, got nowhere.py:setup"),
        (("{file}:number",), "has no function number"),
        ((f"{__file__}c:setup",), "SETUP must be FILE.py:FUNCTION with a file that exists"),
        (("/dev/../etc/hostname:setup",), "SETUP must name a Python file, got /dev/../etc/hostname"),
        (("{file}:incomplete",), "must return a dict with base, loader, loss, model, validation"),
        (("{file}:setup", "--rhos", "-1"), "rho must be a finite number of at least 0, got -1.0"),
        (("{file}:setup", "--methods", "magic"), "--methods must name some of nusam, nusam-norm, sam, sam-on"),
        (("{file}:setup", "--one-pass"), "--one-pass is for nusam and nusam-norm, got sam; name other --methods."),
        (("{file}:setup", "--methods", "sam-on", "--steps", "1"), "SAMON has nothing to perturb"),
        (("{file}:adadelta",), "Adadelta has a hyperparameter rho of its own"),
        (("{file}:once",), "loader must give the same batches to every training, got a list_iterator"),
        (("{file}:asking",), "asking must take no arguments (missing a required argument: 'size'); give them defaults"),
        (("{file}:setup", "--confirm", "1"), "--confirm must be 0 or at least 2, got 1"),
        (("{file}:setup", "--ascent-share", "0.5", "0"), "ascent share must be above 0 and at most 1, got 0.0"),
        (("--model", "huge"), "--model must be one of mixer"),
        (("{file}:setup", "--steps", "1", "--out", "/proc/nowhere"), "can't be written to"),
    ],
)
def test_what_it_refuses(setup, monkeypatch, capsys, arguments, sentence):
    given = [argument.replace("{file}", setup.removesuffix(":setup")) for argument in arguments]
    assert find_rho(monkeypatch, *given) == 2
    assert sentence in capsys.readouterr().err


def test_a_verdict_is_said_saved_drawn_and_gone_on_from(setup, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shuffled = Path(setup.removesuffix(":setup"))
    loader = "torch.utils.data.DataLoader(list(zip(x[:48], x[:48, :3].argmax(1))), 8, shuffle=True)"
    shuffled.write_text(SETUP.replace("batches[:6]", loader))
    options = ("--steps", 12, "--seeds", 1, "--rhos", 0.05, 0.2, "--methods", "nusam", "--ascent-share", 1, 0.125)
    assert find_rho(monkeypatch, setup, *options, "--confirm", 3, "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    recorded = json.loads((out / "rho.json").read_text())
    assert recorded["verdict"]["sentence"] in said
    assert [trial["ascent_share"] for trial in recorded["trials"]] == [1, 1, 1, 0.125, 0.125]
    assert len(recorded["verdict"]["trial"]["scores"]) == len(recorded["verdict"]["base"]["scores"]) == 3
    assert len(recorded["base at equal seconds"]) == 2
    assert (out / "rho.png").stat().st_size > 5_000
    best = torch.load(out / "best.pt", weights_only=True)
    assert f"best.pt, from which {best['what']} goes on" in said
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    model.load_state_dict(best["model"])
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    if recorded["verdict"]["helps"]:
        opt = nusam.NuSAM(opt, model=model)
    opt.load_state_dict(best["optimizer"])
    assert opt.param_groups[0]["lr"] == 0.5


def test_the_default_radii_go_on_until_the_best_has_worse_neighbours(setup, tmp_path, monkeypatch):
    options = ("--steps", 2, "--seeds", 1, "--methods", "nusam", "--confirm", 0, "--out", tmp_path)
    assert find_rho(monkeypatch, setup, *options) == 0
    recorded = json.loads((tmp_path / "rho.json").read_text())
    rhos = [trial["rho"] for trial in recorded["trials"][1:]]
    scores = [trial["scores"][0] for trial in recorded["trials"][1:]]
    assert {0.0125, 0.025, 0.05, 0.1, 0.2, 0.4} <= set(rhos)
    assert len(rhos) == 12 or 0 < scores.index(max(scores)) < len(rhos) - 1
    assert recorded["verdict"] is None


@pytest.mark.parametrize("diverging", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_every_verdict_has_a_figure(diverging, alike, tmp_path):
    score = -float("inf") if diverging else 0.5
    trials = (Trial("NuSAM", 0.1, (0.4, 0.5)), Trial("NuSAM", 0.2, (score, score), 0.125))
    base = Trial("base optimizer", 0.0, (0.1, 0.2), steps=9)
    verdict = Verdict(trials[1], base, 1.2, 2, None, alike, {}, {}, nusam.NuSAM)
    draw(RadiusSearch(base, trials, {("NuSAM", 1.0): base, ("NuSAM", 0.125): base}, verdict), tmp_path / "rho.svg")
    assert (tmp_path / "rho.svg").read_text().startswith("<?xml")
