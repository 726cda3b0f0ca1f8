"""ε in the weights, between the ascent and the end of the descent."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from nusam.distributed.blocks import block, is_sharded, local
from nusam.lmo import Dense, Epsilon, RankOne

__all__ = ["InWeights", "in_weights"]


class InWeights(ABC):
    """Perturbed weights that can be taken back.

    Both methods may be cut short by an exception and called again: ``add`` at most once, ``remove`` any
    number of times; after a complete ``remove`` the weights are the unperturbed ones.
    """

    @abstractmethod
    def add(self) -> None: ...

    @abstractmethod
    def remove(self) -> None: ...


def in_weights(
    parameters: Sequence[Tensor],
    perturbations: Sequence[Epsilon],
    copied: AbstractSet[Tensor] = frozenset(),
    kept: Sequence[Tensor] = (),
) -> InWeights:
    """Prepare to add each perturbation to what is here of its parameter; nothing is written yet.

    Args:
        parameters: what is perturbed.
        perturbations: by how much. A dense one is restored bit for bit, from a copy of the weights.
        copied: parameters of which a rank-one ε is restored so too.
        kept: parameters without a perturbation that are restored all the same.
    """
    kinds = set(map(type, perturbations))
    if len(kinds) > 1:
        raise TypeError("An LMO must return perturbations of one kind, got both Dense and RankOne.")
    restored: list[tuple[Tensor, Epsilon | None]] = [(local(parameter), None) for parameter in kept]
    if kinds == {Dense}:
        return _WithCopy([*restored, *zip(map(local, parameters), perturbations, strict=True)])
    subtracted: list[tuple[Tensor, RankOne]] = []
    for parameter, epsilon in zip(parameters, perturbations, strict=True):
        part = _here(parameter, epsilon)
        if isinstance(part, RankOne) and parameter not in copied:
            subtracted.append((local(parameter), part))
        else:
            restored.append((local(parameter), part))
    return _Both(_RankOneInWeights(subtracted), _WithCopy(restored))


def _here(parameter: Tensor, epsilon: Epsilon) -> Epsilon:
    """The block of ε that belongs to what is here of the parameter."""
    if isinstance(epsilon, Dense) or not is_sharded(parameter):
        return epsilon
    part = block(parameter)
    return epsilon._replace(u=epsilon.u[part.rows], v=epsilon.v[part.columns])


def _factors(epsilon: RankOne, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies to ε entry by entry, in the shape of a parameter that may lie in memory in any order."""
    if epsilon.u.ndim == 2:  # a stack of matrices
        return epsilon.u.unsqueeze(-1), epsilon.v.unsqueeze(-2)
    if parameter.ndim == 2:
        return epsilon.u.unsqueeze(-1), epsilon.v
    others = parameter.shape[1:]
    return epsilon.u.view(-1, *[1] * len(others)), epsilon.v.view(1, *others)


class _Both(InWeights):
    """Some weights in one way, the others in the other."""

    def __init__(self, *ways: InWeights) -> None:
        self._ways = ways

    def add(self) -> None:
        for way in self._ways:
            way.add()

    def remove(self) -> None:
        for way in self._ways:
            way.remove()


class _RankOneInWeights(InWeights):
    """Adds u·vᵀ and subtracts it again: no copy, exact to 1 ulp of the larger of W and W + ε.

    The subtraction must happen exactly as often as the addition, whatever interrupts them. Python delivers
    a signal between two calls, so one call writes all matrices and, last, a marker that tells it was made.
    """

    def __init__(self, perturbed: Sequence[tuple[Tensor, RankOne]]) -> None:
        self._marker = torch.zeros((), device="cpu")  # reading it waits for no device
        one = torch.ones((), device="cpu")
        self._written = [*(parameter for parameter, _ in perturbed), self._marker]
        factors = [_factors(epsilon, parameter) for parameter, epsilon in perturbed]
        self._columns = [*(column for column, _ in factors), one]
        self._rows = [*(row for _, row in factors), one]

    @torch.no_grad()
    def add(self) -> None:
        if len(self._written) > 1:
            torch._foreach_addcmul_(self._written, self._columns, self._rows, value=1)
            torch.clear_autocast_cache()  # an autocast around both passes would go on with its copy of the weights

    @torch.no_grad()
    def remove(self) -> None:
        if len(self._written) > 1 and self._marker.item():
            torch._foreach_addcmul_(self._written, self._columns, self._rows, value=-1)
            torch.clear_autocast_cache()
            self._written = []


class _WithCopy(InWeights):
    """Keeps a copy of the weights while they are perturbed, and restores it bit for bit."""

    def __init__(self, perturbed: Sequence[tuple[Tensor, Epsilon | None]]) -> None:
        self._parameters = [parameter for parameter, _ in perturbed]
        self._perturbations = [epsilon for _, epsilon in perturbed]
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        if self._parameters:
            self._originals = [parameter.clone() for parameter in self._parameters]
            perturbed, dense = [], []
            for parameter, epsilon in zip(self._parameters, self._perturbations, strict=True):
                if type(epsilon) is Dense:
                    perturbed.append(parameter)
                    dense.append(epsilon.epsilon)
                elif isinstance(epsilon, RankOne):
                    parameter.addcmul_(*_factors(epsilon, parameter))
            if dense:
                torch._foreach_add_(perturbed, dense)
            torch.clear_autocast_cache()
        self._perturbations.clear()

    @torch.no_grad()
    def remove(self) -> None:
        if self._originals:
            torch._foreach_copy_(self._parameters, self._originals)
            torch.clear_autocast_cache()
            self._originals = []
