"""What one pass fits: the options of an optimizer, and the matrices that the layers of a model can serve."""

from torch import Tensor, nn

from nusam.ascent.verification import OTHERWISE, SEVERAL_USES, Verdict
from nusam.layers.structure import Structure

__all__ = ["check_fits", "unfit"]


def check_fits(serves: bool, placement: str, in_backward: bool) -> None:
    """Refuse options that leave out what one pass lives by."""
    given = {
        "ascent='gradient'": not serves,
        "placement='weights'": placement == "weights",
        "step_in_backward()": in_backward,
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise ValueError(
            "one_pass() needs products of the layers, an ε in the forward and gradients that stay, which "
            f"{option} does not leave; leave it out, or loop over opt.passes(*batch)."
        )


def unfit(
    structure: Structure | None, parameter: Tensor, verdict: Verdict | None, compiles: bool
) -> tuple[str, str] | None:
    """Why the layers of a target can't serve it, with {} for its name; nothing if they can."""
    if structure is None or not structure.uses_of(parameter):
        return "has no layer that is known to hold {}", ""
    if parameter in structure.sharing:
        return "holds entries of {} in another parameter too", ""
    if compiles and not _is_served_in_a_graph(structure, parameter, verdict):
        return "is compiled", "a graph does not hand out what {} leaves"
    if verdict and verdict.found == OTHERWISE:
        return "uses {} otherwise than by its layer", ""
    return None


def _is_served_in_a_graph(structure: Structure, parameter: Tensor, verdict: Verdict | None) -> bool:
    """Whether a compiled graph hands out the products of a matrix: those of one use by a layer of its own."""
    (use, *more) = structure.uses_of(parameter)
    several = bool(more) or (verdict is not None and verdict.found == SEVERAL_USES)
    return not several and not isinstance(use.module, nn.MultiheadAttention)
