"""What ε costs for any model, counted and measured (Table 1)."""

import gc
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

import nusam
from nusam.experiments.errors import Refused
from nusam.experiments.recipes.allocations import mark, moments
from nusam.experiments.recipes.published_models import DEFAULTS_OF, unknown
from nusam.optimizer import SharpnessAware
from nusam.tools.memory import Footprint, footprint, perturbation_numel

__all__ = [
    "BASES",
    "Base",
    "Cost",
    "Network",
    "costs",
    "measured",
    "network",
    "show",
]


SCALAR = 4  # bytes of the float32 in which AdamW and Adafactor count each parameter's steps


@dataclass(frozen=True)
class Base:
    """A base optimizer, and the bytes of state that it keeps for a parameter."""

    title: str
    make: Callable[[nn.Module], Optimizer]
    state_bytes: Callable[[Tensor], int]


def _adafactor_bytes(parameter: Tensor) -> int:
    """Row and column factors of a matrix or of a stack of matrices, a whole variance of a vector."""
    if parameter.ndim < 2:
        return parameter.nbytes + SCALAR
    *stack, rows, columns = parameter.shape
    return math.prod(stack) * (rows + columns) * parameter.itemsize + SCALAR


BASES = {
    "sgd": Base("SGD", lambda model: SGD(model.parameters(), lr=1e-6), lambda parameter: 0),
    "adamw": Base("AdamW", lambda model: AdamW(model.parameters(), lr=1e-6), lambda p: 2 * p.nbytes + SCALAR),
    "adafactor": Base("Adafactor", lambda model: Adafactor(model.parameters(), lr=1e-6), _adafactor_bytes),
}


@dataclass(frozen=True)
class _Method:
    title: str
    kind: type[SharpnessAware] | None = None  # None: the base optimizer alone, or known from publications only
    published_share: float | None = None  # of SAM's ε, as the paper states it (§2)


ALONE = "base alone"
METHODS = (
    _Method(ALONE),
    _Method("SAM", nusam.SAM),
    _Method("SSAM", published_share=0.5),  # "SSAM can save 50%"
    _Method("FSAM", published_share=0.1),  # "and FSAM roughly 90%"
    _Method("SAM-ON", nusam.SAMON),
    _Method("νSAM", nusam.NuSAM),
)


@dataclass(frozen=True)
class Cost:
    """What a method costs for a model. None: it has nothing to perturb there."""

    method: str
    perturbation: int | None
    """Floats of ε."""
    saved: float | None
    """The share of SAM's ε that it does without."""
    published: bool
    """Whether it follows from the sparsity that the paper states, instead of being counted."""
    total: dict[str, int]
    """For each base optimizer, bytes of weights, gradients, ε and base state; empty where ε is None."""
    relative: dict[str, float]
    """``total`` over the base optimizer's alone."""


def costs(model: nn.Module) -> list[Cost]:
    """A line for the base optimizer alone and for every method; the model may live on the meta device."""
    everything = perturbation_numel(model, nusam.SAM)
    whole = footprint(model, nusam.SAM)
    state = {
        name: sum(base.state_bytes(p) for p in model.parameters() if p.requires_grad) for name, base in BASES.items()
    }
    alone = {name: whole.weights + whole.gradients + size for name, size in state.items()}
    lines = []
    for method in METHODS:
        floats, size = _perturbation(model, method, everything, whole)
        total = {} if size is None else {name: bytes_ + size for name, bytes_ in alone.items()}
        lines.append(
            Cost(
                method=method.title,
                perturbation=floats,
                saved=None if floats is None or method.title == ALONE else 1 - floats / everything,
                published=method.published_share is not None,
                total=total,
                relative={name: bytes_ / alone[name] for name, bytes_ in total.items()},
            )
        )
    return lines


def _perturbation(
    model: nn.Module, method: _Method, everything: int, whole: Footprint
) -> tuple[int | None, int | None]:
    """Floats and bytes of ε."""
    if method.published_share is not None:
        return round(method.published_share * everything), round(method.published_share * whole.perturbation)
    if method.kind is None:
        return 0, 0
    try:
        return perturbation_numel(model, method.kind), footprint(model, method.kind).perturbation
    except ValueError:  # no matrix, or no normalization layer
        return None, None


@dataclass(frozen=True)
class Network:
    """A model by its name: how it is built, and one sample that it takes."""

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module], dict[str, Tensor]]

    def on_meta(self) -> nn.Module:
        """The model without its weights.

        Raises:
            Refused: if it can't be built.
        """
        try:
            with torch.device("meta"):
                return self.build()
        except Exception as error:  # whatever third-party constructors raise
            raise Refused(f"{self.name} can't be built without its weights ({_brief(error)}); name another.") from error


def network(name: str) -> Network:
    """A timm model, a folder with a transformers configuration, or a transformers model type with its defaults.

    Raises:
        Refused: if it is none of these.
    """
    if (Path(name) / "config.json").is_file():
        return _transformers(name, lambda transformers: transformers.AutoConfig.from_pretrained(name))
    if timm.is_model(name):
        return Network(name, lambda: timm.create_model(name), _image)
    kind = DEFAULTS_OF.get(name, name)
    if _has_transformers() and kind in _transformers_module().CONFIG_MAPPING:
        return _transformers(name, lambda transformers: transformers.AutoConfig.for_model(kind))
    raise unknown(name, timm.list_models())


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _transformers_module() -> Any:
    import transformers

    return transformers


def _transformers(name: str, read: Callable[[Any], Any]) -> Network:
    if not _has_transformers():
        raise Refused(f"{name} needs transformers, which is not installed; pip install transformers.")
    transformers = _transformers_module()
    try:
        config = read(transformers)
    except Exception as error:  # whatever a broken file leads to
        raise Refused(f"{name} holds no configuration that transformers knows ({_brief(error)}); mend it.") from error
    return Network(name, lambda: transformers.AutoModel.from_config(config), _tokens_or_image)


def _image(model: Any) -> dict[str, Tensor]:
    return {"x": torch.randn(1, *model.pretrained_cfg["input_size"])}


def _tokens_or_image(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, model.config.num_channels, height, width)}
    return dict(model.dummy_inputs)


@dataclass(frozen=True)
class Measured:
    """Bytes that the allocator counted in the second step, above those of the buffers."""

    held: int
    """At the end of the descent pass: weights, gradients, ε and base state."""
    peak: int
    """At most, activations of one sample included."""


def measured(net: Network, base: Base, kind: type[SharpnessAware] | None) -> Measured:
    """Build the model on the CPU and take two steps on one sample, in evaluation mode.

    Raises:
        Refused: if the model can't be built, or can't take the sample.
    """
    gc.collect()  # what an earlier measurement left would be freed in this one
    buffers = 0

    def program() -> None:
        nonlocal buffers
        buffers = _two_steps(net, base, kind)

    seen = moments(program)
    second = seen[[moment.mark for moment in seen].index("second") :]
    held = next(moment.live for moment in second if moment.mark == "descent")
    return Measured(held - buffers, max(moment.live for moment in second) - buffers)


def _two_steps(net: Network, base: Base, kind: type[SharpnessAware] | None) -> int:
    """Train for two steps; bytes of what is neither weight, gradient, ε nor state."""
    try:
        model = net.build().eval()
        sample = net.sample(model)
        optimizer = base.make(model)
        wrapped = None if kind is None else kind(optimizer, model=model)  # type: ignore[call-arg]
        for turn in ("first", "second"):
            mark(turn)
            for name in ["descent"] if wrapped is None else wrapped.passes():
                _loss(model(**sample)).backward()  # type: ignore[no-untyped-call]
                mark(name)
            (wrapped or optimizer).step()
            optimizer.zero_grad()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise Refused(f"--measure can't train {net.name} on a sample ({_brief(error)}); leave it out.") from error
    return sum(x.nbytes for x in [*model.buffers(), *sample.values()])


def _loss(output: Any) -> Tensor:
    """A scalar that depends on everything that the model returns."""
    parts = output.values() if isinstance(output, Mapping) else output
    parts = [output] if isinstance(output, Tensor) else parts
    losses = [part.square().mean() for part in parts if isinstance(part, Tensor) and part.requires_grad]
    return torch.stack(losses).sum()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def show(name: str, base: str | None, measure: bool) -> int:
    """Print what every method needs for a model, with one base optimizer or all; the exit code."""
    net = network(name)
    model = net.on_meta()
    if not any(p.requires_grad for p in model.parameters()):
        raise Refused(f"{name} has no trainable parameter, so nothing to perturb; name another.")
    lines = costs(model)
    chosen = list(BASES) if base is None else [base]
    measurements = _measurements(net, chosen, lines) if measure else None
    floats = perturbation_numel(model, nusam.SAM)
    table = _rendered(f"{name}, {floats:,} trainable parameters", chosen, lines, measurements)
    console = Console(markup=False)
    # Rather too wide for the terminal than with numbers cut short.
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, needed)
    console.print(table)
    return 0


Measurements = dict[tuple[str, str], Measured]  # for a base optimizer and a method


def _measurements(net: Network, bases: Sequence[str], lines: Sequence[Cost]) -> Measurements:
    return {
        (base, method.title): measured(net, BASES[base], method.kind)
        for base in bases
        for method, line in zip(METHODS, lines, strict=True)
        if line.total and not line.published
    }


def _rendered(title: str, bases: Sequence[str], lines: Sequence[Cost], measurements: Measurements | None) -> Table:
    caption = (
        "MiB of weights, gradients, ε and base state, without activations.\nSGD without momentum.\n"
        "* Published, not measured: from the sparsity that the paper states."
    )
    if measurements is not None:
        caption += (
            "\nHeld: MiB that the allocator counted at the end of a step's descent."
            "\nPeak: at most in a step on one sample, activations included."
        )
    table = Table(title=title, caption=caption, caption_justify="left", box=HORIZONTALS, pad_edge=False)
    table.collapse_padding = True
    table.add_column("method", no_wrap=True)
    headings = ["floats\nof ε", "saved", "MiB", "over\nbase"]
    headings += [] if measurements is None else ["held", "over\nbase", "peak", "over\nbase"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for base in bases:
        for line in lines:
            title = f"{BASES[base].title} alone" if line.method == ALONE else line.method + "*" * line.published
            beside = [] if measurements is None else _beside(measurements, base, line.method)
            table.add_row(title, *_counted(line, base), *beside)
        table.add_section()
    return table


def _counted(line: Cost, base: str) -> list[str]:
    if line.perturbation is None:
        return ["–"] * 4
    saved = "–" if line.saved is None else f"{100 * line.saved:.2f}%"
    floats = ("~" if line.published else "") + f"{line.perturbation:,}"
    return [floats, saved, _mib(line.total[base]), f"{line.relative[base]:.3f}"]


def _beside(measurements: Measurements, base: str, method: str) -> list[str]:
    if (base, method) not in measurements:
        return ["–"] * 4
    mine, alone = measurements[base, method], measurements[base, ALONE]
    return [_mib(mine.held), f"{mine.held / alone.held:.3f}", _mib(mine.peak), f"{mine.peak / alone.peak:.3f}"]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
