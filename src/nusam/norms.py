"""Joint norms of many tensors, on several devices and over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nusam.power_iteration import ALONE, Together, working_dtype

__all__ = [
    "are_alike",
    "largest_entry",
    "multiply_each",
    "norm_of",
    "unit",
]


def unit(
    tensors: Sequence[Tensor], together: Together = ALONE, radii: Sequence[float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors divided in place by their joint ℓ2 norm, times a radius each, and the norm of each result.

    All zero where that norm is zero or not finite. Scaled by the largest entry first, so that the squares
    neither under- nor overflow, unless the host sees without waiting that they don't.
    """
    tensors, radii = list(tensors), [1.0] * len(tensors) if radii is None else list(radii)
    if not are_alike(tensors) or not all(x.numel() for x in tensors):
        return _unit_of_many_kinds(tensors, together, radii)
    if tensors[0].device.type == "cpu" and together is ALONE and tensors[0].dtype is working_dtype(tensors[0]):
        norms = torch.stack(list(torch._foreach_norm(tensors)))
        total, edge = torch.linalg.vector_norm(norms).item(), torch.finfo(norms.dtype).tiny ** 0.25
        if edge < total < 1 / edge:
            factors = [radius / total for radius in radii]
            multiply_each(tensors, factors)
            return tensors, list(norms.mul_(norms.new_tensor(factors).abs_()).unbind())
    maxima = list(torch._foreach_norm(tensors, float("inf")))
    together.max_(maxima)
    torch._foreach_div_(tensors, torch.stack(maxima).amax())
    norms = torch.stack(list(torch._foreach_norm(tensors, 2, dtype=working_dtype(tensors[0]))))
    if together is not ALONE:
        squares = list(norms.square().unbind())
        together.sum_(squares)
        norms = torch.stack(squares).sqrt()
    total = torch.linalg.vector_norm(norms)  # NaN where the largest entry is zero, infinite or NaN
    dead = ~total.isfinite()
    torch._foreach_div_(tensors, total.to(tensors[0].dtype))
    multiply_each(tensors, radii)
    if dead.device.type != "cpu" or dead.item():  # elsewhere the host would have to wait
        for x in tensors:
            x.masked_fill_(dead, 0)
    shares = list((norms / total).masked_fill_(dead, 0).unbind())
    multiply_each(shares, [abs(radius) for radius in radii])
    return tensors, shares


def are_alike(tensors: Sequence[Tensor]) -> bool:
    return len({(x.device, x.dtype) for x in tensors}) == 1


def multiply_each(tensors: list[Tensor], factors: Sequence[float]) -> None:
    """Each of these, of one kind, in place with its own factor; one tensor is faster than a list of numbers."""
    if min(factors) == max(factors):
        torch._foreach_mul_(tensors, tensors[0].new_full((), factors[0]))
    else:
        torch._foreach_mul_(tensors, list(factors))


def _unit_of_many_kinds(
    tensors: list[Tensor], together: Together, radii: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`unit` of tensors on several devices, of several dtypes, or some of them empty."""
    device, dtype = tensors[0].device, working_dtype(tensors[0])

    def joint(norms: Sequence[Tensor]) -> Tensor:
        return torch.stack([norm.to(device, dtype) for norm in norms])

    maxima = [largest_entry(x) for x in tensors]
    together.max_(maxima)
    largest = joint(maxima).amax()
    scaled = [x.div_(largest.to(x.device)) for x in tensors]
    squares = [torch.linalg.vector_norm(x, dtype=working_dtype(x)).square() for x in scaled]
    together.sum_(squares)
    norms = joint(squares).sqrt()
    total = torch.linalg.vector_norm(norms)
    dead = ~(total.isfinite() & (largest > 0))
    for x, radius in zip(scaled, radii, strict=True):
        x.div_(total.to(x.device)).mul_(radius).masked_fill_(dead.to(x.device), 0)
    shares = (norms / total).masked_fill_(dead, 0)
    return scaled, [share.to(x.device) * abs(radius) for share, x, radius in zip(shares, scaled, radii, strict=True)]


def largest_entry(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf")) if x.numel() else x.new_zeros(())


def norm_of(x: Tensor) -> Tensor:
    """‖x‖₂ in the working dtype."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=working_dtype(x))
    return norm
