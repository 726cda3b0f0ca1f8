"""Small matrices as copies for groups of samples, so that a layer is one batched product of torch's own.

Where launches dominate, a function in Python for each layer costs more than the products that it saves. A batch and the
samples behind it are groups of equally many samples; the first groups meet W + ε and the others W. Autograd gives a
gradient for every copy: those of the first groups add up to this batch's, those of the others to the next ascent's.
"""

from collections.abc import Callable, Hashable, Mapping
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nusam.layers.kinds import UNSAFE_VIEW, Conv1D, Kind, Linear, is_altered, is_plain
from nusam.layers.reads import Watched
from nusam.layers.structure import Structure
from nusam.lmo import RankOne, State
from nusam.one_pass.joint import CannotJoin, Rows
from nusam.power_iteration import TopPair, power_iteration_of_stack

__all__ = ["Copies", "Copy", "Family", "by_copies", "suits"]

LARGEST = 2**17  # entries of all copies of a matrix up to which they cost less than a function in Python


class Copy(NamedTuple):
    """The copies of one matrix, to be multiplied with from the right: (groups, m, n)."""

    kind: type[Kind]
    matrices: Tensor


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

    def families(
        self, rows: Rows, epsilons: Mapping[Tensor, RankOne], states: Mapping[Tensor, State]
    ) -> "list[Family]":
        """Those of one step, by their shapes.

        Args:
            rows: the samples of both sides.
            epsilons: what the first rows see of each matrix.
            states: the warm starts of those of which the rows behind are to leave a pair.
        """
        size = gcd(*rows)
        groups = Rows(rows.first // size, rows.second // size)
        found: dict[Hashable, Family] = {}
        for parameter in {**epsilons, **states}:
            epsilon, state = epsilons.get(parameter), states.get(parameter)
            vector = epsilon.u if state is None else state["u"]  # type: ignore[union-attr]
            kind = self._kind_of(parameter, sum(groups))
            if kind is not None and parameter.dtype == vector.dtype and parameter.device == vector.device:
                alike = kind, parameter.shape, parameter.dtype, parameter.device
                if alike not in found:
                    found[alike] = Family(kind, groups)
                found[alike].members.append(_Member(parameter, epsilon, state))
        return list(found.values())

    def _kind_of(self, parameter: Tensor, groups: int) -> type[Kind] | None:
        """How its layer multiplies with a matrix, if copies would do."""
        if parameter in self.unwanted or type(parameter) not in (nn.Parameter, Watched) or not parameter.requires_grad:
            return None
        uses = self.structure.uses_of(parameter)
        if len(uses) != 1 or parameter.numel() * groups > LARGEST:
            return None
        (use,) = uses
        return use.kind if use.kind in (Linear, Conv1D) and not isinstance(use.module, nn.MultiheadAttention) else None


class _Member(NamedTuple):
    parameter: Tensor
    epsilon: RankOne | None
    state: State | None


class Family:
    """Matrices of one shape, whose copies are made in one tensor.

    Args:
        kind: how their layers multiply with them.
        groups: of samples, on both sides.
    """

    def __init__(self, kind: type[Kind], groups: Rows) -> None:
        self.kind, self.groups = kind, groups
        self.members: list[_Member] = []
        self._left: list[tuple[list[int], Tensor]] = []  # whom a backward has reached, and their gradients behind

    def copies(self, tap: Tensor, accumulates: Callable[[], bool]) -> dict[Tensor, Copy]:
        """For every matrix.

        Args:
            tap: reached where autograd accumulates.
            accumulates: whether it does in the running backward.
        """
        parameters = [member.parameter for member in self.members]
        with torch.enable_grad():
            copies = _Copied.apply(tap, self, accumulates, *parameters)
        return {parameter: Copy(self.kind, own) for parameter, own in zip(parameters, copies, strict=True)}

    def take(self, reached: list[int], gradients: Tensor) -> None:
        """What the rows behind have left of some."""
        self._left.append((reached, gradients))

    def forget(self) -> None:
        """No backward has come by."""
        self._left = []

    def gradients(self) -> tuple[list[_Member], Tensor | None]:
        """Who was reached by the rows behind, and by which gradients."""
        if not self._left:
            return [], None
        reached, total = self._left[0]
        if len(self._left) > 1:
            everybody = sorted({i for some, _ in self._left for i in some})
            total = total.new_zeros(len(everybody), *total.shape[1:])
            for some, gradients in self._left:
                total.index_add_(0, torch.tensor([everybody.index(i) for i in some], device=total.device), gradients)
            reached = everybody
        return [self.members[i] for i in reached], total

    def pairs(self, iterations: int) -> dict[Tensor, TopPair]:
        """The top pairs of what the rows behind have left."""
        members, gradients = self.gradients()
        chosen = [i for i, member in enumerate(members) if member.state is not None]
        if gradients is None or not chosen:
            return {}
        if len(chosen) < len(members):
            gradients = gradients[chosen]
        us = [state["u"] for member in members if (state := member.state) is not None]
        pairs = power_iteration_of_stack(gradients, us, iterations)
        return {members[i].parameter: pair for i, pair in zip(chosen, pairs, strict=True)}


def suits(kind: type[Kind], x: Tensor, dtype: torch.dtype, samples: int) -> bool:
    """Whether a layer's input is that of all samples, in rows of the precision that its matrix has."""
    if kind not in (Linear, Conv1D) or x.ndim < 2 or x.dtype != dtype or torch._C._is_any_autocast_enabled():
        return False
    length = x.shape[0]
    return length > 0 and length % samples == 0 and is_plain(x) and not is_altered(kind)


def by_copies(copy: Copy, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output."""
    matrices = copy.matrices
    groups, m, n = matrices.shape
    X = x if x.ndim == 3 and x.shape[0] == groups else x.reshape(groups, -1, m)
    Y = torch.bmm(X, matrices) if bias is None else torch.baddbmm(bias, X, matrices)
    return Y if X is x else UNSAFE_VIEW(Y, (*x.shape[:-1], n))


class _Copied(torch.autograd.Function):
    """The copies of matrices of one shape: W + ε for the first groups, W for the others."""

    @staticmethod
    def forward(
        ctx: Any, tap: Tensor, family: Family, accumulates: Callable[[], bool], *Ws: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what no backward reaches has no gradient
        ctx.family, ctx.accumulates = family, accumulates
        epsilons = [member.epsilon for member in family.members]
        perturbed = W = torch.stack(Ws)
        if any(epsilon is not None for epsilon in epsilons):
            us = torch.stack([W.new_zeros(W.shape[1]) if e is None else e.u for e in epsilons])
            vs = torch.stack([W.new_zeros(W.shape[2]) if e is None else e.v for e in epsilons])
            perturbed = torch.baddbmm(W, us[:, :, None], vs[:, None, :])
        parts = [
            part[:, None].expand(-1, count, -1, -1) for part, count in zip((perturbed, W), family.groups, strict=True)
        ]
        copies = torch.cat(parts, 1)
        return (copies if family.kind is Conv1D else copies.mT).unbind()

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise CannotJoin("has a gradient inside its loss")
        family: Family = ctx.family
        gradients: list[Tensor | None] = [None] * len(given)
        reached = [i for i, gradient in enumerate(given) if gradient is not None]
        stacked = torch.stack([gradient for gradient in given if gradient is not None])
        if family.kind is not Conv1D:
            stacked = stacked.mT
        first = family.groups.first
        # copied apart, since each may be written by itself
        own = torch._foreach_mul(stacked[:, :first].sum(1).unbind(), 1.0)
        for i, gradient in zip(reached, own, strict=True):
            gradients[i] = gradient
        if ctx.accumulates():
            behind = stacked[:, first:]
            family.take(reached, behind.squeeze(1) if behind.shape[1] == 1 else behind.sum(1))
        return None, None, None, *gradients
