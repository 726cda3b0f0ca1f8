"""The sweeps on the pages are drawn from what was measured."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nusam.experiments.pages.result import Curve, Result, read_all

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = runpy.run_path(str(DOCS / "figures.py"))
SWEEPS = [result for result in read_all(DOCS / "results") if FIGURES["SWEEPS"].fullmatch(result.name)]

SWEEP = Result(
    name="fig2",
    title="Accuracy over ρ",
    scale="cpu",
    data="digits",
    columns=[],
    rows=[],
    curves=[
        Curve("Mixer", "AdamW", [0.02, 2.0], [90.0, 90.0], "ρ", "test accuracy, %", error=[0.5, 0.5], log_x=True),
        Curve("Mixer", "νSAM", [0.02, 0.1, 0.4], [90.1, 91.5, 80.0], "ρ", "test accuracy, %", [0.5] * 3, log_x=True),
        Curve("ViT", "SAM", [0.1, 0.2, 0.4], [75.0, None, 70.0], "ρ", "test accuracy, %", log_x=True, log_y=True),
    ],
)


def drawn(result, path):
    FIGURES["draw"](result, path)
    return path.read_text("utf-8")


def lines(svg):
    """The path of each curve, as matplotlib wrote it."""
    root = ElementTree.fromstring(svg)
    groups = [group for group in root.iter("{http://www.w3.org/2000/svg}g") if group.get("id", "").startswith("line2d")]
    paths = [group.find("{http://www.w3.org/2000/svg}path") for group in groups]
    return [path.get("d") for path in paths if path is not None and "L" in path.get("d", "") and path.get("style")]


@pytest.mark.parametrize("result", SWEEPS, ids=lambda result: result.file_name)
def test_the_committed_picture_is_that_of_the_committed_result(result, tmp_path):
    committed = DOCS / "assets" / Path(result.file_name).with_suffix(".svg")
    drawing = drawn(result, tmp_path / committed.name)
    assert lines(drawing) == lines(committed.read_text("utf-8")), "run python docs/figures.py"


@pytest.mark.skipif(len(SWEEPS) < 2, reason="figures 2 and 3 are not among the results")
def test_numbers_of_the_page_are_in_the_results():
    tables = "".join(path.read_text("utf-8") for path in (DOCS / "results").glob("*.md"))
    page = (DOCS / "choosing-rho.md").read_text("utf-8")
    measured = re.sub(r"^    .*", "", page, flags=re.MULTILINE)  # without what a command may print
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", measured)
    assert len(quoted) >= 8
    for number in quoted:
        assert number in tables, number


def test_a_picture_is_the_same_every_time_and_follows_the_numbers(tmp_path):
    first = drawn(SWEEP, tmp_path / "a.svg")
    assert drawn(SWEEP, tmp_path / "a.svg") == first
    other = replace(SWEEP, curves=[SWEEP.curves[0], replace(SWEEP.curves[1], y=[90.1, 92.5, 80.0]), SWEEP.curves[2]])
    assert lines(drawn(other, tmp_path / "a.svg")) != lines(first)


def test_every_curve_is_in_the_picture(tmp_path):
    svg = drawn(SWEEP, tmp_path / "a.svg")
    for label in ("AdamW", "SAM", "νSAM"):
        assert FIGURES["LOOK_OF"][label][0].lower() in svg.lower() or label == "AdamW"
    whole = len(lines(svg))
    assert len(lines(drawn(replace(SWEEP, curves=SWEEP.curves[1:]), tmp_path / "b.svg"))) < whole
