"""How much of a model a method reaches, and by name what it does not."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from torch import Tensor

from nusam.lmo import unpacked_shape

__all__ = ["Candidate", "Coverage", "covered", "warn_of_small_reach"]

SMALL = 0.1  # the share of entries below which a method is likely not what was meant


class Candidate(NamedTuple):
    """A parameter that could be perturbed."""

    parameter: Tensor
    radius: float  # before the schedule; negative where the base optimizer maximizes
    left_out: str | None  # why it was not meant to be perturbed


class Coverage(NamedTuple):
    """What :meth:`nusam.SharpnessAware.coverage` counts and names."""

    perturbed: int
    """Entries that are perturbed."""
    trainable: int
    """Entries that could be: the trainable ones, or with ``targets="frozen"`` the frozen ones."""
    left_out: dict[str, str]
    """Of every parameter that is not perturbed, by name, its shape and why."""

    @property
    def share(self) -> float:
        """Perturbed entries per entry; 0 where there is none."""
        return self.perturbed / self.trainable if self.trainable else 0.0


def covered(
    candidates: Sequence[Candidate],
    names: Mapping[Tensor, str],
    perturbs: Callable[[Tensor], bool],
    method: str,
    targets: object,
    unreached: AbstractSet[Tensor] = frozenset(),
) -> Coverage:
    """Count what ``perturbs`` selects among the candidates, and name the others.

    Args:
        candidates: what the optimizer holds, and what else may be perturbed.
        names: of the candidates, and of the other parameters that count.
        perturbs: whether the method perturbs a parameter at all.
        method: its name and what it perturbs, as in "NuSAM perturbs a 2-D parameter".
        targets: the option of that name.
        unreached: those of which no gradient was found where they were meant to be perturbed.
    """
    found = {candidate.parameter: candidate for candidate in candidates}
    perturbed = total = 0
    left_out: dict[str, str] = {}
    for parameter, name in names.items():
        _, radius, reason = found.get(parameter, Candidate(parameter, 0.0, "not held by the optimizer"))
        if parameter.requires_grad == (targets == "frozen") and not (callable(targets) and reason is None):
            continue
        shape = unpacked_shape(parameter)
        total += shape.numel()
        if reason is None and radius == 0:
            reason = "rho is 0"
        if reason is None and not perturbs(parameter):
            reason = f"{method} only"
        if reason is None and parameter in unreached:
            reason = "got no gradient in the ascents"
        if reason is None:
            perturbed += shape.numel()
        else:
            left_out[name] = f"{tuple(shape)}: {reason}"
    return Coverage(perturbed, total, left_out)


def warn_of_small_reach(
    candidates: Sequence[Candidate], perturbs: Callable[[Tensor], bool], method: str, convolutions: bool
) -> None:
    """Warn if the method perturbs little of what it was meant to, such as νSAM on a network of convolutions.

    ``convolutions``: whether there is an option of that name to give.
    """
    meant = [c.parameter for c in candidates if c.radius != 0 and c.left_out is None]
    total = sum(unpacked_shape(parameter).numel() for parameter in meant)
    perturbed = sum(unpacked_shape(parameter).numel() for parameter in meant if perturbs(parameter))
    if perturbed < SMALL * total:
        hint = ", and convolutions=True as far as they are kernels" if convolutions else ""
        warnings.warn(
            f"{method} only, which is {perturbed:,} of the {total:,} entries handed to it, less than a tenth; "
            f"opt.coverage() names the others, which nusam.SAM would perturb{hint}.",
            stacklevel=4,  # over step() and the profiler that torch puts around it
        )
