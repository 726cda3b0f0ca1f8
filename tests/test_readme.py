"""The snippets of README and docs run, and their figures are the recorded ones."""

import inspect
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import nusam

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def scope():
    """What a reader has at hand before the snippets start."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator)
    loader = list(zip(x.split(8), x[:, :4].argmax(1).split(8), strict=True))
    return {"torch": torch, "nusam": nusam, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()}


@contextmanager
def processes_of_one():
    """What torchrun would have set up."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_it_can_be_read_in_a_sitting():
    assert README.count("\n") < 140
    assert len(README) < 7_000


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4
    assert len(DIFFS) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet, scope):
    if "frozen" in snippet:
        scope["model"][0].requires_grad_(False)
    scope["opt"] = nusam.NuSAM(torch.optim.AdamW(scope["model"].parameters(), lr=1e-3), model=scope["model"])
    scope["x"], scope["y"] = scope["loader"][0]
    before = scope["model"][3].weight.detach().clone()
    with processes_of_one() if "DistributedDataParallel" in snippet else nullcontext():
        exec(snippet, scope)
    if ".step(" in snippet:
        assert not torch.equal(scope["model"][3].weight, before)


@pytest.mark.parametrize("side", ["+", "-"])
def test_the_adoption_diff_runs_on_both_sides(side, scope):
    lines = [line[1:] for line in DIFFS[0].splitlines() if line[0] in (" ", side)]
    before = scope["model"][0].weight.detach().clone()
    exec("\n".join(lines), scope)
    assert not torch.equal(scope["model"][0].weight, before)
    assert isinstance(scope["opt"], nusam.NuSAM) == (side == "+")


def test_links_into_the_repository_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_the_tables_are_the_recorded_ones():
    recorded = "".join(page.read_text() for page in (ROOT / "benchmarks" / "results").glob("*.md"))
    rows = [
        line
        for line in PAGES.splitlines()
        if line.startswith(("| SGD |", "| ViT-S/4", "| Mixer-S/4", "| ViT-B/16 | 1", "| BERT", "| GPT-2"))
    ]
    assert len(rows) >= 11
    for row in rows:
        assert row in recorded, row


def test_the_projected_steps_are_the_recorded_ones():
    recorded = (ROOT / "benchmarks" / "results" / "communication-projected-cpu.md").read_text()
    rows = [line.strip("|").split("|") for line in recorded.splitlines() if line.startswith("| LLaMA-7B shape | FSDP2")]
    seconds = {cells[2].strip(): cells[-1].split()[0] for cells in rows}
    page = (ROOT / "docs" / "one-pass.md").read_text()
    names = {"νSAM matrix-free": "νSAM, whole batch", "νSAM at 1/8": "νSAM at 1/8, two passes"}
    for method in ("AdamW", "SAM", "νSAM matrix-free", "νSAM at 1/8", "νSAM at 1/8, one pass"):
        ratio = float(seconds[method]) / float(seconds["AdamW"])
        written = "1" if method == "AdamW" else f"{ratio:.2f}"
        assert f"| {names.get(method, method)} | {seconds[method]} | {written} |" in page


def test_every_public_name_has_a_docstring():
    for name in nusam.__all__:
        thing = getattr(nusam, name)
        assert isinstance(thing, str) or (thing.__doc__ or "").strip(), name
        if isinstance(thing, type):
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_") and callable(value):
                    assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"
