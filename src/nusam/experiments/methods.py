"""The optimizers that the experiments compare, under the names of the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from torch.optim import Optimizer

import nusam

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A sharpness-aware method around AdamW, or AdamW alone."""

    title: str
    perturb: Callable[..., nusam.SharpnessAware] | None = None
    delay: float = 0.0  # the share of training that AdamW takes alone
    radii: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # worth trying, for each model

    def delay_steps(self, steps: int) -> int:
        """How many of so many steps AdamW takes alone."""
        return int(self.delay * steps)

    def wrap(self, base: Optimizer, rho: float, steps: int, model: nn.Module) -> Optimizer:
        """The optimizer for a training of so many steps."""
        if self.perturb is None:
            return base
        return self.perturb(base, rho=rho, delay=self.delay_steps(steps), model=model)


# νSAM's ρ is the radius of each matrix, SAM's that of all parameters together, so their ranges differ. SAM-ON gets
# no delay: the paper finds that it does not help there (Table 9).
_NUSAM_RADII = {"mixer": (0.05, 0.1, 0.2), "vit": (0.01, 0.03, 0.1)}

METHODS = {
    "adamw": Method("AdamW"),
    "sam": Method("SAM", nusam.SAM, 0.1, {"mixer": (0.1, 0.2, 0.4), "vit": (0.05, 0.1, 0.2)}),
    "sam-on": Method("SAM-ON", nusam.SAMON, 0.0, {"mixer": (0.5, 1.0, 2.0), "vit": (0.3, 1.0, 3.0)}),
    "nusam": Method("νSAM", nusam.NuSAM, 0.1, _NUSAM_RADII),
    **{
        f"nusam-{every}": Method(
            f"νSAM, ascent_every={every}", partial(nusam.NuSAM, ascent_every=every), 0.1, _NUSAM_RADII
        )
        for every in (2, 5, 10)
    },
}
