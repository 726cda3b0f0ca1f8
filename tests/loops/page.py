"""The table of outcomes: ``python -m tests.loops.page`` runs every loop and writes the table into docs/loops.md."""

import functools
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import torch

from tests.loops.loop import Loop
from tests.loops.running import MODES, Outcome, outcome

KINDS = (
    "several_backwards",
    "by_hand",
    "gradients_inside",
    "adversaries",
    "weights_elsewhere",
    "weights_read",
    "made_weights",
    "changing_layers",
    "odd_layers",
    "odd_inputs",
    "unreached",
    "checkpoints",
    "without_gradients",
    "frozen_weights",
    "changing_state",
    "hooks",
    "surroundings",
    "changing_loops",
    "passes",
)
MODULES = [importlib.import_module(f"tests.loops.{kind}") for kind in KINDS]
PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
BEGIN, END = "<!-- outcomes, generated -->", "<!-- end of the outcomes -->"
SHORT = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}

Cells = dict[tuple[str, str], str]  # (what a loop does, mode) → outcome, with its sentences in brackets


def run(case: type[Loop], mode: str, dtype: torch.dtype) -> Outcome:
    """A loop's outcome, where small matrices are worth serving too unless the loop says otherwise."""
    if case.worth_serving is None:
        return outcome(case, mode, dtype)
    with patch("nusam.optimizer.WORTH_SERVING", case.worth_serving):
        return outcome(case, mode, dtype)


def cell(outcomes: dict[torch.dtype, Outcome]) -> str:
    """What a loop's outcomes in one mode are called, by dtype only where they differ."""
    by_words: dict[str, list[str]] = {}
    for dtype, result in outcomes.items():
        by_words.setdefault(_words(result), []).append(SHORT[dtype])
    (most, _), *others = by_words.items()
    return "; ".join([most, *(f"{' and '.join(dtypes)}: {words}" for words, dtypes in others)])


def _words(result: Outcome) -> str:
    sentences = " ".join(dict.fromkeys(f"[{_in_general(sentence)}]" for sentence in result.said))
    if result.verdict != "right":
        return f"{'no' if result.verdict == 'refused' else result.verdict} {sentences}"
    by_gradients = result.fallbacks & result.perturbed
    how = ""
    if by_gradients:
        how = ", by gradients" if by_gradients == result.perturbed else ", in part by gradients"
    return f"yes{how}{', and says ' if sentences else ''}{sentences}"


def _in_general(sentence: str) -> str:
    """A sentence without the names and shapes of one loop."""
    sentence = re.sub(r"\(\d+, \d+\)", "(n, m)", sentence)
    sentence = re.sub(r"used \d+ times", "used k times", sentence)
    return re.sub(r"^[\w.]+(, [\w.]+)*(?= (is|are|got|was) )", "NAME", sentence)


def table(cells: Cells) -> str:
    """Markdown: a table for every kind of loop, and the sentences below."""
    sentences: list[str] = []

    def numbered(match: re.Match[str]) -> str:
        if match[1] not in sentences:
            sentences.append(match[1])
        return f"({sentences.index(match[1]) + 1})"

    lines = [summary(cells)]
    for module in MODULES:
        lines += ["", f"### {module.__doc__}", "", f"| the loop | {' | '.join(MODES)} |", "| --- " * 5 + "|"]
        for case in loops_of(module.__name__):
            row = [re.sub(r"\[(.*?)\]", numbered, cells[case.__doc__, mode]) for mode in MODES]
            lines.append(f"| {case.__doc__} | {' | '.join(row)} |")
    return "\n".join([*lines, "", "### What is said", "", *(f"{i}. {s}" for i, s in enumerate(sentences, 1))])


def summary(cells: Cells) -> str:
    """The counts, from the cells alone."""
    loops = {loop for loop, _ in cells}
    partly = {loop for loop, mode in cells if "no [" in cells[loop, mode]}
    refused = [key for key in cells if cells[key].startswith("no [")]
    wrong = [key for key in cells if "WRONG" in cells[key]]
    usual = [loop for loop in loops if not cells[loop, "default"].startswith("no [")]
    return (
        f"{len(loops)} loops, of which {len(loops - partly)} are right in all four ways and every precision, and "
        f"{len(usual)} by default; {len(refused)} of {len(cells)} combinations are refused whatever the precision. "
        f"{len(wrong) or 'None'} {'are' if wrong else 'is'} wrong."
    )


def loops_of(module: str) -> list[type[Loop]]:
    return [case for case in Loop.known if case.__module__ == module]


@functools.cache
def committed() -> tuple[str, Cells]:
    """The summary and the cells as they stand on the page."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    sentences = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    cells: Cells = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| the loop |", "| ---")):
            loop, *row = line.strip("| ").split(" | ")
            for mode, short in zip(MODES, row, strict=True):
                cells[loop, mode] = re.sub(r"\((\d+)\)", lambda match: f"[{sentences[match[1]]}]", short)
    return text.splitlines()[0], cells


def write(cases: Iterable[type[Loop]]) -> None:
    cells = {(c.__doc__, mode): cell({d: run(c, mode, d) for d in c.dtypes}) for c in cases for mode in MODES}
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(cells)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Loop.known)
