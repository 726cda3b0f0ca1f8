"""Small matrices as copies for groups of samples, so that a layer is one batched product of torch's own.

Where launches dominate, a function in Python for each layer costs more than the products that it saves. A batch and the
samples behind it are groups of equally many samples; the first groups meet W + ε and the others W. Autograd gives a
gradient for every copy: those of the first groups add up to this batch's, those of the others to the next ascent's.
"""

from collections.abc import Hashable
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nusam.ascent.record import Record
from nusam.layers.kinds import UNSAFE_VIEW, Conv1D, Kind, Linear
from nusam.layers.structure import Structure, has_hooks
from nusam.lmo import RankOne
from nusam.one_pass.joint import CannotJoin, Rows

__all__ = ["Copies", "Copy", "by_copies"]

LARGEST = 2**17  # entries of all copies of a matrix up to which they cost less than a function in Python


class Copy(NamedTuple):
    """The copies of one matrix, to be multiplied with from the right: (groups, m, n)."""

    kind: type[Kind]
    matrices: Tensor


class _Member(NamedTuple):
    parameter: Tensor
    epsilon: RankOne | None
    record: Record | None


class Copies:
    """Makes the copies of the matrices that are small, and that one plain linear layer uses.

    Args:
        structure: where the model uses them.

    Attributes:
        unwanted: matrices whose layers were given what copies can't be multiplied with.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.unwanted: set[Tensor] = set()

    def made(
        self, rows: Rows, epsilons: dict[Tensor, RankOne], records: dict[Tensor, Record], tap: Tensor
    ) -> dict[Tensor, Copy]:
        """Those of one step.

        Args:
            rows: the samples of both sides.
            epsilons: what the first rows see of each matrix.
            records: take what the rows behind leave.
            tap: reached where autograd accumulates.
        """
        size = gcd(*rows)
        first, groups = rows.first // size, sum(rows) // size
        families: dict[Hashable, list[_Member]] = {}
        for parameter in {**epsilons, **records}:
            epsilon, record = epsilons.get(parameter), records.get(parameter)
            vector = record.u if epsilon is None else epsilon.u
            kind = self._kind_of(parameter, groups)
            if kind is not None and parameter.dtype == vector.dtype and parameter.device == vector.device:
                alike = kind, parameter.shape, parameter.dtype, parameter.device
                families.setdefault(alike, []).append(_Member(parameter, epsilon, record))
        found = {}
        for (kind, *_), members in families.items():
            with torch.enable_grad():
                copies = _Copied.apply(tap, kind, first, groups, members, *[m.parameter for m in members])
            found.update({member.parameter: Copy(kind, own) for member, own in zip(members, copies, strict=True)})
        return found

    def _kind_of(self, parameter: Tensor, groups: int) -> type[Kind] | None:
        """How its layer multiplies with a matrix, if copies would do."""
        if parameter in self.unwanted or type(parameter) is not nn.Parameter or not parameter.requires_grad:
            return None
        uses = self.structure.uses_of(parameter)
        if len(uses) != 1 or parameter.numel() * groups > LARGEST or has_hooks(parameter):
            return None
        (use,) = uses
        return use.kind if use.kind in (Linear, Conv1D) and not isinstance(use.module, nn.MultiheadAttention) else None


def by_copies(copy: Copy, samples: int, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The layer's output; None if its input is not that of all samples in rows of one precision."""
    kind, matrices = copy
    if x.ndim < 2 or x.dtype != matrices.dtype or torch._C._is_any_autocast_enabled():
        return None
    length = x.shape[0]
    if length == 0 or length % samples:
        return None
    groups, m, n = matrices.shape
    X = x if x.ndim == 3 and length == groups else x.reshape(groups, -1, m)
    Y = torch.bmm(X, matrices) if bias is None else torch.baddbmm(bias, X, matrices)
    return Y if X is x else UNSAFE_VIEW(Y, (*x.shape[:-1], n))


class _Copied(torch.autograd.Function):
    """The copies of matrices of one shape: W + ε for the first groups, W for the others."""

    @staticmethod
    def forward(
        ctx: Any, tap: Tensor, kind: type[Kind], first: int, groups: int, members: list[_Member], *Ws: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what no backward reaches has no gradient
        ctx.right, ctx.first, ctx.members = kind is Conv1D, first, members
        W = torch.stack(Ws)
        perturbed = W
        epsilons = [member.epsilon for member in members]
        if any(epsilon is not None for epsilon in epsilons):
            us = torch.stack([W.new_zeros(W.shape[1]) if e is None else e.u for e in epsilons])
            vs = torch.stack([W.new_zeros(W.shape[2]) if e is None else e.v for e in epsilons])
            perturbed = torch.baddbmm(W, us[:, :, None], vs[:, None, :])
        if not ctx.right:
            W, perturbed = W.mT, perturbed.mT
        parts = ((perturbed, first), (W, groups - first))
        return torch.cat([part[:, None].expand(-1, count, -1, -1) for part, count in parts], 1).unbind()

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise CannotJoin("has a gradient inside its loss")
        gradients: list[Tensor | None] = [None] * len(given)
        reached = [i for i, gradient in enumerate(given) if gradient is not None]
        stacked = torch.stack([gradient for gradient in given if gradient is not None])
        if not ctx.right:
            stacked = stacked.mT
        # copied apart, since each may be written by itself
        own = torch._foreach_mul(stacked[:, : ctx.first].sum(1).unbind(), 1.0)
        for i, gradient in zip(reached, own, strict=True):
            gradients[i] = gradient
        behind = stacked[:, ctx.first :].sum(1).unbind()
        for i, gradient in zip(reached, behind, strict=True):
            record = ctx.members[i].record
            if record is not None:
                record.take_formed(gradient)
        return *[None] * 5, *gradients
