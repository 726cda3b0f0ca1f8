"""Table 1's counts: against the paper, against real optimizers' state, and against the allocator."""

import json
import re

import pytest
import torch
from torch import nn

import nusam
from nusam.experiments.commands.memory import Memory
from nusam.experiments.errors import Refused
from nusam.experiments.pages.result import read_all
from nusam.experiments.recipes.memory_table import BASES, METHODS, Network, costs, measured, network
from nusam.experiments.recipes.perturbation_costs import table1

KIB = 2**10


class Assorted(nn.Module):
    """Parameters of 0 to 4 dimensions, one frozen, one of size one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        shapes = [(), (5,), (3, 4), (1, 7), (7, 1), (2, 3, 4), (6, 2, 3, 3)]
        self.all = nn.ParameterList(torch.randn(shape, dtype=dtype) for shape in shapes)
        self.frozen = nn.Parameter(torch.randn(9, 9, dtype=dtype), requires_grad=False)


def state_bytes(optimizer):
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_the_state_is_that_of_a_real_step(base, dtype):
    model = Assorted(dtype)
    optimizer = BASES[base].make(model)
    sum(p.square().sum() for p in model.all).backward()
    optimizer.step()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert state_bytes(optimizer) == sum(BASES[base].state_bytes(p) for p in trainable)
    weights, gradients = (sum(p.nbytes for p in ps) for ps in (model.parameters(), trainable))
    assert costs(model)[0].total[base] == weights + gradients + state_bytes(optimizer)


def test_every_cost_of_a_small_model_by_hand():
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))  # 54+9, 9+9, 36+4 weights
    lines = {line.method: line for line in costs(model)}
    assert list(lines) == [method.title for method in METHODS]
    floats = {"base alone": 0, "SAM": 121, "SSAM": 60, "FSAM": 12, "SAM-ON": 18, "νSAM": 15 + 13}
    assert {name: line.perturbation for name, line in lines.items()} == floats
    assert lines["νSAM"].saved == pytest.approx(1 - 28 / 121)
    assert lines["νSAM"].total == {
        "sgd": 4 * (121 + 121 + 28),
        "adamw": 4 * (121 + 121 + 28 + 2 * 121 + 6),
        "adafactor": 4 * (121 + 121 + 28 + (15 + 9 + 9 + 9 + 13 + 4) + 6),
    }
    assert lines["νSAM"].relative["sgd"] == pytest.approx((242 + 28) / 242)
    assert lines["SAM"].relative["sgd"] == 1.5
    assert {name for name, line in lines.items() if line.published} == {"SSAM", "FSAM"}


def test_a_method_with_nothing_to_perturb_is_marked():
    lines = {line.method: line for line in costs(nn.Conv2d(3, 4, 3))}
    for name in ("νSAM", "SAM-ON"):
        assert lines[name].perturbation is None
        assert lines[name].total == lines[name].relative == {}
    assert lines["SAM"].perturbation == 112


def test_counting_needs_no_weights():
    model = network("vit_base_patch16_224").on_meta()
    assert all(p.is_meta for p in model.parameters())
    lines = {line.method: line for line in costs(model)}
    assert lines["νSAM"].perturbation == 149_224
    assert lines["SAM"].perturbation == 86_567_656


def _tiny_transformer(folder, kind="bert", **options):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.AutoConfig.for_model(kind, **{**small, "intermediate_size": 16, **options}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def roomy_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.usefixtures("roomy_terminal")
def test_the_command_prints_every_base_and_method(capsys):
    assert Memory("test_vit")() == 0
    printed = capsys.readouterr().out
    for base in BASES.values():
        assert f"{base.title} alone" in printed
    for word in ("test_vit, 371,240", "SAM-ON", "SSAM*", "FSAM*", "νSAM", "371,240", "6,440", "1.500", "not measured"):
        assert word in printed
    assert "held" not in printed
    assert Memory("test_vit", base="sgd")() == 0
    assert "AdamW" not in capsys.readouterr().out


def test_no_number_is_cut_short_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert Memory("vit_large_patch16_224")() == 0
    printed = capsys.readouterr().out
    assert "304,326,632" in printed
    assert "…" not in printed


def test_the_command_reads_a_transformers_folder(tmp_path, capsys):
    assert Memory(_tiny_transformer(tmp_path), base="adamw", measure=True)() == 0
    printed = capsys.readouterr().out
    assert "held" in printed
    assert "peak" in printed


def test_transformers_defaults_by_name():
    pytest.importorskip("transformers")
    for name in ("bert", "bert-base-uncased"):
        assert sum(p.numel() for p in network(name).on_meta().parameters()) == 109_482_240  # as published, with pooler


def test_a_transformer_for_images_is_measured(tmp_path):
    folder = _tiny_transformer(tmp_path, "vit", image_size=16, patch_size=8)
    net = network(folder)
    counted = costs(net.on_meta())[0]
    assert 0 <= measured(net, BASES["sgd"], None).held - counted.total["sgd"] <= 64 * KIB


@pytest.mark.parametrize("base", BASES)
def test_what_is_counted_is_what_the_allocator_holds(base):
    net = network("test_vit")
    alone = None
    for method, line in zip(METHODS, costs(net.on_meta()), strict=True):
        if line.published:
            continue
        mine = measured(net, BASES[base], method.kind)
        alone = alone or mine
        assert 0 <= mine.held - line.total[base] <= 64 * KIB  # of 3 MiB or more
        assert mine.held <= mine.peak
        assert abs((mine.held - alone.held) - 4 * line.perturbation) <= 16 * KIB


def test_the_measured_step_is_a_real_one():
    taken = []

    class Counting(nn.Linear):
        def forward(self, x):
            taken.append(self.weight.detach().clone())
            return super().forward(x)

    net = Network("counting", lambda: Counting(3, 2), lambda model: {"x": torch.ones(1, 3)})
    measured(net, BASES["sgd"], nusam.SAM)
    assert len(taken) == 4  # two passes of two steps
    assert not torch.equal(taken[0], taken[1])


@pytest.mark.parametrize(
    ("sentence", "command"),
    [
        ("--base must be one of sgd, adamw, adafactor, got lion.", Memory("test_vit", base="lion")),
        ("got vit_bse_patch16_224; did you mean vit_base_patch16_224?", Memory("vit_bse_patch16_224")),
        ("got ???; choose from timm.list_models().", Memory("???")),
    ],
)
def test_refusals(sentence, command):
    with pytest.raises(Refused, match=re.escape(sentence)):
        command()


def test_a_broken_configuration_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}), "utf-8")
    with pytest.raises(Refused, match="holds no configuration that transformers knows") as raised:
        network(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_model_that_cannot_be_run_is_refused():
    net = Network("odd", lambda: nn.Linear(3, 2), lambda model: {"x": torch.ones(1, 4)})
    with pytest.raises(Refused, match="--measure can't train odd on a sample") as raised:
        measured(net, BASES["sgd"], None)
    assert "\n" not in str(raised.value)

    def broken():
        raise RuntimeError("no\nweights")

    with pytest.raises(Refused, match=r"odd can't be built without its weights \(no weights\)"):
        Network("odd", broken, dict).on_meta()


def test_table1_stands_beside_the_paper(tmp_path):
    result = table1("smoke")
    rows = {(row["model"], row["method"]): row for row in result.rows}
    assert len(rows) == len(result.rows) == 3 * len(METHODS)
    assert all(list(row) == result.columns for row in result.rows)
    large, base = rows["ViT-L/16", "νSAM"], rows["ViT-B/16", "νSAM"]
    assert (large["floats of ε"], large["paper"]) == (395_240, "395k floats")
    assert (base["floats of ε"], base["paper"]) == (149_224, "saves more than 99.8%")
    assert base["saved"] == "99.83%"
    assert rows["ViT-L/16", "SAM-ON"]["saved"] == "99.97%"
    assert rows["ViT-B/16", "SAM"]["floats of ε"] == 86_567_656
    assert rows["ViT-B/16", "SAM"]["paper"] is None  # not in the text
    assert {row["source"] for row in result.rows if row["method"] in ("SSAM", "FSAM")} == {"published"}
    assert rows["ViT-L/16", "SAM"]["bytes over SGD"] == "1.5000"
    # (2·304,326,632 + 395,240) / (3·304,326,632) of SAM's floats with SGD
    assert large["below SAM, SGD"] == f"{100 * (1 - (2 * 304_326_632 + 395_240) / (3 * 304_326_632)):.2f}%" == "33.29%"
    assert result.findings.count("agrees") == 6
    # 288 to 574 times is less than three orders of magnitude
    (unlike,) = [line for line in result.findings.splitlines() if "does not agree" in line]
    assert "3 orders of magnitude" in unlike
    assert "288 to 574" in unlike
    result.write(tmp_path)
    assert read_all(tmp_path) == [result]


def test_the_scales_of_table1():
    assert {row["model"] for row in table1("full").rows} == {"ViT-B/16", "ViT-L/16"}
    with pytest.raises(ValueError, match="scale must be one of smoke, cpu, full, got 'huge'"):
        table1("huge")
