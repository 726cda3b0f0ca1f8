"""Weights of few bits, in every way: ``python -m tests.low_precision`` writes what becomes of them into the docs.

Each is held to a loop by hand: a twin's own backward, a float64 SVD, ε in a copy of the weights.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nusam

PAGE = Path(__file__).parents[1] / "docs" / "precision.md"
BEGIN, END = "<!-- weights of few bits, generated -->", "<!-- end of the weights of few bits -->"
RHO, STEPS, ITERATIONS = 0.5, 3, 40
TOLERANCE = 0.03  # of the rise of the loss: activations of 8 bits are rounded
QUANTIZED = (0, 2)  # layers
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "matrix-free": {"ascent": "matrix-free"},
    "forward": {"placement": "forward"},
    "gradient": {"ascent": "gradient"},
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 4))


def sample(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 64, generator=generator), torch.randint(0, 4, (16,), generator=generator)


# ------------------------------------------------------------------------------- kinds


def torchao(name: str, **options: Any) -> Callable[[nn.Sequential], None]:
    """By a configuration of torchao's."""

    def convert(net: nn.Sequential) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        prototype = pytest.importorskip("torchao.prototype.quantized_training")
        config = getattr(quantization, name, None) or getattr(prototype, name)
        for i in QUANTIZED:
            quantization.quantize_(net[i], config(**options))

    return convert


def float8_training(net: nn.Sequential) -> None:
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(net, config=config, module_filter_fn=lambda _, name: name in ("0", "2"))


def bitsandbytes(layer: str, **options: Any) -> Callable[[nn.Sequential], None]:
    """By a layer of bitsandbytes'."""

    def convert(net: nn.Sequential) -> None:
        kind = getattr(pytest.importorskip("bitsandbytes").nn, layer)
        for i in QUANTIZED:
            new = kind(net[i].in_features, net[i].out_features, **options)
            new.load_state_dict(net[i].state_dict())
            net[i] = new.to("cpu")
        net(torch.zeros(1, 64))  # the first forward settles how they compute

    return convert


class Kind(NamedTuple):
    """How layers are quantized, and whether their weights can be trained."""

    convert: Callable[[nn.Sequential], None]
    trained: bool


FOUR_BITS = {"weight_dtype": torch.int4}
KINDS = {
    "torchao `Int8WeightOnlyConfig`": Kind(torchao("Int8WeightOnlyConfig"), False),
    "torchao `IntxWeightOnlyConfig`, 4 bits": Kind(torchao("IntxWeightOnlyConfig", **FOUR_BITS), False),
    "torchao `Float8WeightOnlyConfig`": Kind(torchao("Float8WeightOnlyConfig"), False),
    "torchao `Int8DynamicActivationInt8WeightConfig`": Kind(torchao("Int8DynamicActivationInt8WeightConfig"), False),
    "bitsandbytes `Linear4bit`": Kind(bitsandbytes("Linear4bit", compute_dtype=torch.float32), False),
    "bitsandbytes `Linear8bitLt`": Kind(bitsandbytes("Linear8bitLt", has_fp16_weights=False), False),
    "torchao `int8_weight_only_quantized_training`": Kind(torchao("int8_weight_only_quantized_training"), True),
    "torchao `int8_mixed_precision_training`": Kind(torchao("int8_mixed_precision_training"), True),
    "torchao `bitnet_training`": Kind(torchao("bitnet_training"), True),
    "torchao `convert_to_float8_training`": Kind(float8_training, True),
}


def converted(kind: str) -> nn.Sequential:
    net = model()
    KINDS[kind].convert(net)
    return net


# ------------------------------------------------------------------------------- by hand


def entries(layer: nn.Module) -> Tensor:
    """The matrix that a layer computes with: what it makes of unit vectors."""
    weight: Any = layer.weight
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return weight.detach()
    return (layer(torch.eye(layer.in_features)) - layer.bias).T.detach()


def inside(weight: Any) -> Tensor | None:
    """The floating-point tensor that a weight of another class keeps its entries in, if it does."""
    if type(weight) is nn.Parameter:
        return weight.data
    names, _ = weight.__tensor_flatten__()
    kept: Tensor = max((getattr(weight, name) for name in names), key=Tensor.numel)
    return kept if kept.itemsize > 1 else None


def dense(net: nn.Sequential) -> nn.Sequential:
    """A model of the matrices that the layers compute with."""
    twin = model()
    with torch.no_grad():
        for i in (*QUANTIZED, 4):
            twin[i].weight.copy_(entries(net[i]))
            twin[i].bias.copy_(net[i].bias)
    return twin


def by_hand(net: nn.Sequential, step: int, frozen: bool) -> tuple[float, float]:
    """The loss, and that at the perturbed weights."""
    x, y = sample(step)
    whole = frozen or inside(net[0].weight) is None
    twin = dense(net) if whole else copy.deepcopy(net)
    twin.zero_grad()
    loss = F.cross_entropy(twin(x), y)
    loss.backward()
    with torch.no_grad():
        for i in QUANTIZED if frozen else (*QUANTIZED, 4):
            U, _, V = torch.linalg.svd(twin[i].weight.grad.double(), full_matrices=False)
            inside(twin[i].weight).add_((RHO * torch.outer(U[:, 0], V[0])).to(torch.float32))
        return float(loss), float(F.cross_entropy(twin(x), y))


def descent_gradients(net: nn.Sequential, rho: float = 0.3) -> list[Tensor]:
    """Of a dense model's parameters, at the weights that the first sample perturbs."""
    x, y = sample(0)
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(x), y).backward()
    with torch.no_grad():
        for p in twin.parameters():
            if p.ndim == 2:
                U, _, V = torch.linalg.svd(p.grad.double(), full_matrices=False)
                p.add_((rho * torch.outer(U[:, 0], V[0])).to(p.dtype))
    return list(torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())))


# ------------------------------------------------------------------------------- what becomes of them


def outcome(kind: str, frozen: bool, way: str) -> str:
    """*yes*, perhaps by gradients; a refusal in one sentence; or what is wrong."""
    net = converted(kind)
    for i in QUANTIZED if frozen else ():
        net[i].requires_grad_(False)
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    targets = "frozen" if frozen else "trainable"
    try:
        opt = nusam.NuSAM(base, RHO, model=net, targets=targets, power_iterations=ITERATIONS, **WAYS[way])
        fell_back = False
        for step in range(STEPS):
            loss, expected = by_hand(net, step, frozen)
            x, y = sample(step)
            losses = []
            for _ in opt.passes():
                losses.append(F.cross_entropy(net(x), y))
                losses[-1].backward()
            if abs(losses[-1].item() - expected) > TOLERANCE * (expected - loss):
                return f"WRONG: the perturbed loss is {losses[-1].item():.4f} in step {step}, not {expected:.4f}"
            fell_back |= any(name.startswith("fallback/") for name in opt.metrics())
            opt.step()
    except (ValueError, TypeError, RuntimeError) as error:
        sentence = str(error).replace("(128, 64)", "(n, m)").replace("0.weight", "NAME")
        return f"no [{sentence}]" if "; " in sentence else f"WRONG: {sentence}"
    return "yes, by gradients" if fell_back else "yes"


COLUMNS = ["frozen", *(f"trained, {way}" for way in WAYS)]


def cells(kind: str) -> list[str]:
    trained = [outcome(kind, False, way) if KINDS[kind].trained else "–" for way in WAYS]
    return [outcome(kind, True, "default"), *trained]


def table(rows: dict[str, list[str]]) -> str:
    """Markdown, and the sentences of what is refused below."""
    sentences: list[str] = []

    def numbered(match: re.Match[str]) -> str:
        if match[1] not in sentences:
            sentences.append(match[1])
        return f"({sentences.index(match[1]) + 1})"

    lines = [f"| weights | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {' | '.join(re.sub('[[](.*)[]]', numbered, cell) for cell in row)} |")
    return "\n".join([*lines, "", *(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))])


def committed() -> dict[str, list[str]]:
    """The rows as they stand on the page."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    sentences = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| weights", "| ---")):
            kind, *row = line.strip("| ").split(" | ")
            rows[kind] = [re.sub(r"\((\d+)\)", lambda match: f"[{sentences[match[1]]}]", cell) for cell in row]
    return rows


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table({kind: cells(kind) for kind in KINDS})}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
