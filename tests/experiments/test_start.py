"""What a command imports before it answers: to ask for help, or to mistype a word, is no reason to wait for torch."""

import json
import re
import subprocess
import sys

import pytest
import timm

from nusam.experiments.commands import find_rho, memory
from nusam.experiments.commands.main import main
from nusam.experiments.recipes import memory_table, published_models
from nusam.experiments.training.data import DATASETS
from nusam.experiments.training.methods import METHOD_NAMES
from nusam.experiments.training.models import TITLES
from nusam.tools.radius_search import RHOS

COMMANDS = ("demo", "train", "sweep", "reproduce", "memory", "report", "find-rho")
SLOW = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "sklearn",
    "scipy",
    "matplotlib",
    "plotly",
    "tensorboard",
    "ray",
)
REFUSED = [  # options, values, commands, numbers and files
    ["bogus"],
    ["--bogus"],
    ["train", "--bogus"],
    ["train", "--epochs", "many"],
    ["train", "--epochs", "0"],
    ["train", "--rho", "nan"],
    ["train", "--model", "resnet"],
    ["train", "--augment", "blur"],
    ["train", "--data", "nosuch"],
    ["train", "--data", "cifar100"],
    ["train", "--data", "cifar100", "--data-root", "nowhere"],
    ["train", "--data", "folder", "--data-root", "nowhere"],
    ["train", "--data", "tsv", "--data-root", "nowhere"],
    ["train", "--data", "sentences"],  # a model for images
    ["train", "--data", "sentences", "--out", "/proc/nowhere", "--model", "bert-tiny"],
    ["sweep", "--engine", "steam"],
    ["sweep", "--rhos", "-1"],
    ["sweep", "--seeds", "0"],
    ["sweep", "--results", "/proc/nowhere"],
    ["sweep", "--data", "movie-reviews", "--results", "results"],
    ["demo", "--wrong-labels", "2"],
    ["demo", "--seeds", "0"],
    ["demo", "--data", "cifar10"],
    ["reproduce", "table99"],
    ["reproduce", "table2", "--scale", "huge"],
    ["reproduce", "table2", "--scale", "smoke", "--data", "cifar10"],
    ["reproduce", "table4", "--scale", "full", "--data", "cifar10", "--results", "results"],
    ["reproduce", "table14", "--scale", "full", "--results", "results"],
    ["memory"],
    ["memory", "vit_bse_patch16_224"],
    ["memory", "nowhere/config.json"],
    ["memory", "test_vit", "--base", "lion"],
    ["report", "--results", "nowhere"],
    ["find-rho", "nowhere.py:setup"],
    ["find-rho", "--methods", "magic"],
    ["find-rho", "--rhos", "0.1", "inf"],
    ["find-rho", "--steps", "0"],
    ["find-rho", "--learning-rate", "-1"],
    ["find-rho", "--data", "cifar10"],
]
ASK = """
import contextlib, io, json, sys
lines, slow = json.loads(sys.argv[1]), json.loads(sys.argv[2])
from nusam.experiments.commands.main import main
answers = []
for line in lines:
    sys.argv = ["nusam", *line]
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    answers.append([code, [name for name in slow if name in sys.modules and name not in before]])
print(json.dumps(answers))
"""


def answers(tmp_path, *lines):
    """The exit codes of command lines in one process, and what each imported of what takes long."""
    command = [sys.executable, "-c", ASK, json.dumps(lines), json.dumps(SLOW)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    return json.loads(said)


def test_help_imports_no_torch(tmp_path):
    lines = [["--help"], *([name, "--help"] for name in COMMANDS)]
    assert dict(zip(map(tuple, lines), answers(tmp_path, *lines), strict=True)) == {tuple(x): [0, []] for x in lines}


def test_help_names_all_that_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nusam", "train", "--help"])
    with pytest.raises(SystemExit):
        main()
    words = set(re.findall(r"-?[a-z][a-z0-9/-]*", capsys.readouterr().out))
    names = {name.replace("glue-", "-") for name in DATASETS} | TITLES.keys() | set(METHOD_NAMES)
    assert names - words - {"adamw", "-cola"} == set()
    assert "glue-cola" in words


def test_a_refusal_imports_no_torch(tmp_path):
    found = dict(zip(map(tuple, REFUSED), answers(tmp_path, *REFUSED), strict=True))
    assert found == {tuple(line): [2, []] for line in REFUSED}


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        (["demo", "--device", "abacus"], {"torch"}),  # which devices there are, torch alone knows
        (["train", "--device", "abacus"], {"torch"}),
        (["demo", "--out", "/proc/nowhere"], {"sklearn", "scipy"}),  # has the digits
    ],
)
def test_a_refusal_imports_no_more_than_it_is_about(line, needed, tmp_path):
    ((code, imported),) = answers(tmp_path, line)
    assert code == 2
    assert set(imported) <= needed


def test_what_has_been_run_is_listed_without_torch(tmp_path):
    assert answers(tmp_path, ["reproduce", "--list"]) == [[0, []]]


def test_what_is_said_twice_is_the_same():
    """A name that an option declares, and what it stands for, which needs torch."""
    assert find_rho.RHOS == RHOS
    assert set(memory.BASES) == set(memory_table.BASES)


def test_the_names_of_timms_models_are_those_that_it_lists():
    assert published_models.timm_models() == sorted(timm.list_models())
    for name in ("test_vit", "vit_base_patch16_224.augreg2_in21k_ft_in1k", "bert", "gpt2", "bert-base-uncased"):
        published_models.require_known(name)
