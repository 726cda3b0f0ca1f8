"""The optimizers that the experiments compare, under the names of the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nusam
from nusam.experiments.errors import Refused
from nusam.experiments.training.spec import Run

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["ALONE", "BASES", "METHODS", "METHOD_NAMES", "Base", "Method", "kept_as", "require_one_base", "title"]


@dataclass(frozen=True)
class Base:
    """A base optimizer of ``torch.optim``, by its name there."""

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, model: "nn.Module", rate: float, decay: float, beta2: float | None = None) -> "Optimizer":
        """The optimizer of a model's parameters; ``beta2`` is of Adam and AdamW."""
        import torch

        kind = getattr(torch.optim, self.title)
        options = {**self.options, **({} if beta2 is None else {"betas": (0.9, beta2)})}
        optimizer: Optimizer = kind(model.parameters(), lr=rate, weight_decay=decay, **options)
        return optimizer


BASES = {
    "sgd": Base("SGD", {"momentum": 0.9}),
    "adam": Base("Adam"),
    "adamw": Base("AdamW"),
    "adafactor": Base("Adafactor"),
}


@dataclass(frozen=True)
class Method:
    """A sharpness-aware method around a base optimizer, or that alone."""

    title: str
    kind: str = ""  # of nusam; none is the base optimizer alone
    delay: float = 0.0  # the share of training that the base optimizer takes alone
    radii: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # worth trying, for each model
    low_rank: bool = False  # whether it takes power_iterations
    options: Mapping[str, Any] = field(default_factory=dict)
    ascent_work: float = 1.0  # of the ascent on a whole batch, in operations, over the base optimizer's step

    def delay_steps(self, run: Run, steps: int) -> int:
        """How many of so many steps the base optimizer takes alone."""
        return int((self.delay if run.delay is None else run.delay) * steps)

    def wrap(self, base: "Optimizer", run: Run, steps: int, model: "nn.Module") -> "Optimizer":
        """The optimizer for a training of so many steps."""
        if not self.kind:
            return base
        options = {**self.options, **({"power_iterations": run.power_iterations} if self.low_rank else {})}
        kind: Callable[..., nusam.SharpnessAware] = getattr(nusam, self.kind)
        delay, share = self.delay_steps(run, steps), run.ascent_share
        return kind(base, rho=run.rho, delay=delay, ascent_share=share, model=model, seed=run.seed, **options)


# νSAM's ρ is the radius of each matrix, SAM's that of all parameters together, so their ranges differ. SAM-ON gets
# no delay: the paper finds that it does not help there (Table 9).
_NUSAM_RADII = {"mixer": (0.05, 0.1, 0.2), "vit": (0.01, 0.03, 0.1)}
_SAM_RADII = {"mixer": (0.1, 0.2, 0.4), "vit": (0.05, 0.1, 0.2)}
_NORM_RADII = {"mixer": (0.1, 0.2, 0.4), "vit": (0.03, 0.1, 0.2)}

ALONE = "adamw"  # under this name the base optimizer alone is kept, whichever it is

METHODS = {
    ALONE: Method("AdamW", ascent_work=0.0),
    "sam": Method("SAM", "SAM", 0.1, _SAM_RADII),
    "sam-on": Method("SAM-ON", "SAMON", 0.0, {"mixer": (0.5, 1.0, 2.0), "vit": (0.3, 1.0, 3.0)}),
    "nusam": Method("νSAM", "NuSAM", 0.1, _NUSAM_RADII, low_rank=True, ascent_work=2 / 3),
    "nusam-norm": Method("νSAM-Norm", "NuSAMNorm", 0.1, _NORM_RADII, low_rank=True, ascent_work=2 / 3),
    "gauss": Method("GaussSAM", "GaussSAM", 0.1, _SAM_RADII),
}

METHOD_NAMES = ("none", *METHODS)  # as they can be given


def kept_as(method: str) -> str:
    """The name under which runs of a method are kept: ``none`` is the base optimizer alone."""
    return ALONE if method == "none" else method


def require_one_base(option: str, method: str, base: str) -> None:
    """Refuse a method that is a base optimizer other than the one named."""
    if method in BASES and method != base:
        raise Refused(f"--{option} {method} and --base {base} are two base optimizers; give --{option} none.")


def title(method: str, base: str = "adamw") -> str:
    """A method's name for readers; of the base optimizer alone, that of the base."""
    return BASES[base].title if method == ALONE else METHODS[method].title
