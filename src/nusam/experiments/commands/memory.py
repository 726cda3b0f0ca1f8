"""``nusam memory``: what ε costs for any model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from nusam.experiments.errors import Refused
from nusam.experiments.recipes.published_models import require_known

__all__ = ["Memory"]

BASES = ("sgd", "adamw", "adafactor")


@dataclass(frozen=True)
class Memory:
    """Count the memory that sharpness-aware minimization needs for a model.

    Floats of ε for SAM, SAM-ON and νSAM, and total bytes with the base optimizer relative to it alone. SSAM and FSAM
    by the sparsity that the paper states.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """A timm model, a transformers model type such as bert, or a folder with a transformers config.json."""
    base: str | None = None
    """sgd, adamw or adafactor; all three unless given."""
    measure: bool = False
    """Also build the model on the CPU and measure a step on one sample with each method."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        if self.base is not None and self.base not in BASES:
            raise Refused(f"--base must be one of {', '.join(BASES)}, got {self.base}.")
        require_known(self.name)
        from nusam.experiments.recipes.memory_table import show

        return show(self.name, self.base, self.measure)
