"""What a terminal shows of a result, and the demo's picture, around awkward numbers."""

import math

import pytest
from rich.console import Console

from nusam.experiments.pages.demo_figure import learning_and_price
from nusam.experiments.pages.result import Curve, Result
from nusam.experiments.pages.table import show


def result_of(rows, curves=(), findings="", scale=""):
    return Result("demo", "A title", scale, "digits", ["model", "method", "accuracy"], rows, list(curves), findings)


def shown(result, width=80):
    console = Console(width=width, record=True, markup=False)
    show(result, console)
    return console.export_text()


def test_a_method_stays_on_one_line_and_models_are_set_apart():
    rows = [
        {"model": "Mixer", "method": "AdamW, best epoch", "accuracy": "1.00 ± 0.10"},
        {"model": "ViT", "method": "νSAM at 1/8", "accuracy": "2.00"},
    ]
    lines = shown(result_of(rows)).splitlines()
    mixer, vit = (
        next(i for i, line in enumerate(lines) if name in line) for name in ("AdamW, best epoch", "νSAM at 1/8")
    )
    assert vit == mixer + 2  # a line between


@pytest.mark.parametrize("rows", [[], [{"model": "Mixer"}]])
def test_cells_may_be_missing(rows):
    assert "A title" in shown(result_of(rows))


@pytest.mark.parametrize(("scale", "title"), [("", "A title\n"), ("cpu", "A title (cpu, digits)")])
def test_a_scale_is_named_where_there_is_one(scale, title):
    assert title in "\n".join(line.strip() for line in shown(result_of([], scale=scale)).splitlines()) + "\n"


def test_findings_are_shown():
    assert "ended near chance" in shown(result_of([], findings="- 2 of 4 runs ended near chance."))


@pytest.mark.parametrize("error", [None, [0.5]])
@pytest.mark.parametrize("value", [50.0, math.nan, None])
def test_the_picture_survives_awkward_numbers(tmp_path, value, error):
    spread = None if error is None else [0.5, 0.5]
    curves = [
        Curve("Mixer", "AdamW", [1.0, 2.0], [10.0, value], "epoch", "accuracy", spread),
        Curve("Mixer, gain and price", "AdamW, best epoch", [1.0], [value], "work", "accuracy", error),
        Curve("Mixer, gain and price", "νSAM at 1/8", [1.08], [40.0], "work", "accuracy", error),
    ]
    learning_and_price(result_of([], curves), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
