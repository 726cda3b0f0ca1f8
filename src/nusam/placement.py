"""ε in the weights between the ascent and the end of the descent pass; in the forward, see :mod:`nusam.layers`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nusam.lmo import Dense, Perturbation, RankOne

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


def in_weights(parameters: Sequence[Tensor], perturbations: Sequence[Perturbation]) -> InWeights:
    """Prepare to add each perturbation to its parameter; nothing is written yet."""
    rank_one = [perturbation for perturbation in perturbations if isinstance(perturbation, RankOne)]
    dense = [perturbation for perturbation in perturbations if isinstance(perturbation, Dense)]
    if rank_one and dense:
        raise TypeError("An LMO must return perturbations of one kind, got both Dense and RankOne.")
    return _RankOneInWeights(parameters, rank_one) if rank_one else _DenseInWeights(parameters, dense)


class _RankOneInWeights(InWeights):
    """Adds u·vᵀ and subtracts it again: no copy, exact to 1 ulp of the larger of W and W + ε.

    The subtraction must happen exactly as often as the addition, whatever interrupts them. Python delivers
    a signal between two calls, so one call writes all matrices and, last, a marker that tells it was made.
    """

    def __init__(self, parameters: Sequence[Tensor], perturbations: Sequence[RankOne]) -> None:
        self._marker = torch.zeros(())  # on the CPU: reading it waits for no device
        one = torch.ones(())
        self._written = [*parameters, self._marker]
        self._columns = [*(perturbation.u[:, None] for perturbation in perturbations), one]
        self._rows = [*(perturbation.v[None, :] for perturbation in perturbations), one]

    @torch.no_grad()
    def add(self) -> None:
        torch._foreach_addcmul_(self._written, self._columns, self._rows, value=1)
        torch.clear_autocast_cache()  # an autocast around both passes would go on with its copy of the weights

    @torch.no_grad()
    def remove(self) -> None:
        if self._marker.item():
            torch._foreach_addcmul_(self._written, self._columns, self._rows, value=-1)
            torch.clear_autocast_cache()


class _DenseInWeights(InWeights):
    """Keeps a copy of the weights while they are perturbed, and restores it bit for bit."""

    def __init__(self, parameters: Sequence[Tensor], perturbations: Sequence[Dense]) -> None:
        self._parameters = list(parameters)
        self._epsilons = [perturbation.epsilon for perturbation in perturbations]
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        if self._parameters:
            self._originals = [parameter.clone() for parameter in self._parameters]
            torch._foreach_add_(self._parameters, self._epsilons)
            torch.clear_autocast_cache()
        self._epsilons.clear()

    @torch.no_grad()
    def remove(self) -> None:
        if self._originals:
            torch._foreach_copy_(self._parameters, self._originals)
            torch.clear_autocast_cache()
            self._originals = []
