"""The ε that one step leaves for the next: what the rows behind give, and how the next step takes it."""

from typing import Any

import torch
from torch import Tensor

from nusam.lmo import LMO, Nuclear, RankOne
from nusam.one_pass.riders import Riders
from nusam.stepping import Stepping

__all__ = ["found_behind", "iterations", "perturb_by", "weighed"]

# The loss of the samples behind counts so little that what it leaves in a gradient which is not told apart by rows (of
# a norm, a position, a layer that is no target) is below any rounding. The products have no scale.
BEHIND = 2.0**-60


def weighed(mine: Tensor, other: Tensor) -> Tensor:
    """The first loss, whose backward runs that of the second too."""
    both: Tensor = _Both.apply(mine, other)
    return both


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, other: Tensor) -> Tensor:
        ctx.dtype = other.dtype
        return mine.view_as(mine)

    @staticmethod
    def backward(ctx: Any, D: Tensor) -> Any:
        return D, (D * BEHIND).to(ctx.dtype)


@torch.no_grad()
def found_behind(opt: Stepping, riders: Riders) -> dict[Tensor, RankOne] | None:
    """The next step's ε, for radii of 1; None if a layer was used otherwise than before."""
    ascent = opt._ascent
    pass_ = riders.pass_
    riders.settle(iterations(opt.lmo))
    otherwise = [p for p, record in pass_.records.items() if record.is_lost() or record.count_differs()]
    for parameter in otherwise:
        ascent.verification.forget(parameter)
    if otherwise:
        pass_.release()
        return None
    others = [target.parameter for target in riders.targets if target.parameter not in pass_.known]
    gradients = [parameter.grad for parameter in others]
    measured = ascent.measured
    for parameter in others:
        parameter.grad = None  # this batch's, which is no part of the next ε
    try:
        found = ascent.perturbations(riders.targets, pass_, 0, opt._workers())
    finally:
        ascent.measured = measured
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
        pass_.release()
    pairs = {p: epsilon for p, epsilon in found.items() if isinstance(epsilon, RankOne)}
    if pairs:
        torch._foreach_div_([epsilon.sigma for epsilon in pairs.values()], BEHIND)
    return pairs


def perturb_by(opt: Stepping, waiting: dict[Tensor, RankOne]) -> None:
    """The next descent perturbs by what an earlier pass has found, for radii of 1."""
    targets = opt._targets()
    found = [(t.parameter, abs(t.radius), waiting[t.parameter]) for t in targets if t.parameter in waiting]
    radii = [radius for _, radius, _ in found]
    vs, norms = [epsilon.v for _, _, epsilon in found], [epsilon.norm for _, _, epsilon in found]
    if found:
        vs, norms = list(torch._foreach_mul(vs, radii)), list(torch._foreach_mul(norms, radii))
    opt._pending = {
        parameter: RankOne(epsilon.u, v, epsilon.sigma, norm)
        for (parameter, _, epsilon), v, norm in zip(found, vs, norms, strict=True)
    }
    opt._ascended, opt._is_carried = [target.parameter for target in targets], True
    opt._ascent.measure(opt._pending)
    opt._guard.forget_ascent()
    opt._written.forget_ascent()
    opt._progress.ascents += 1


def iterations(lmo: LMO) -> int:
    """Of a step's power iteration."""
    return lmo.power_iterations if isinstance(lmo, Nuclear) else 1
