"""ε in the weights between the ascent and the end of the descent pass; in the forward, see :mod:`nusam.layers`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nusam.lmo import Dense, Perturbation, RankOne
from nusam.sharding import block, is_sharded, local

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
    parameters: Sequence[Tensor], perturbations: Sequence[Perturbation], bit_exact: bool = False
) -> InWeights:
    """Prepare to add each perturbation to what is here of its parameter; nothing is written yet.

    ``bit_exact``: whether a rank-one ε must be restored bit for bit too, at the cost of a copy of the weights.
    """
    here = [_here(p, epsilon) for p, epsilon in zip(parameters, perturbations, strict=True)]
    rank_one = [epsilon for epsilon in here if isinstance(epsilon, RankOne)]
    if rank_one and len(rank_one) < len(here):
        raise TypeError("An LMO must return perturbations of one kind, got both Dense and RankOne.")
    written = [local(parameter) for parameter in parameters]
    return _RankOneInWeights(written, rank_one) if rank_one and not bit_exact else _WithCopy(written, here)


def _here(parameter: Tensor, epsilon: Perturbation) -> Perturbation:
    """The block of ε that belongs to what is here of the parameter."""
    if isinstance(epsilon, Dense) or not is_sharded(parameter):
        return epsilon
    part = block(parameter)
    return epsilon._replace(u=epsilon.u[part.rows], v=epsilon.v[part.columns])


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


class _WithCopy(InWeights):
    """Keeps a copy of the weights while they are perturbed, and restores it bit for bit."""

    def __init__(self, parameters: Sequence[Tensor], perturbations: Sequence[Perturbation]) -> None:
        self._parameters = list(parameters)
        self._perturbations = list(perturbations)
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        if self._parameters:
            self._originals = [parameter.clone() for parameter in self._parameters]
            for parameter, epsilon in zip(self._parameters, self._perturbations, strict=True):
                if isinstance(epsilon, RankOne):
                    parameter.addcmul_(epsilon.u[:, None], epsilon.v[None, :])
                else:
                    parameter.add_(epsilon.epsilon)
            torch.clear_autocast_cache()
        self._perturbations.clear()

    @torch.no_grad()
    def remove(self) -> None:
        if self._originals:
            torch._foreach_copy_(self._parameters, self._originals)
            torch.clear_autocast_cache()
            self._originals = []
