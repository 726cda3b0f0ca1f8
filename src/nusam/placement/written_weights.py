"""Weights that a model writes in its own forward, as tables and layers with a maximal norm do.

An ε that was added before such a write can't be subtracted after it: those weights are kept by a copy. Which they
are is known of torch's own layers; of others it is seen by what a write leaves behind.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from nusam.distributed.blocks import is_sharded
from nusam.guards.watch import Watch, is_here
from nusam.layers.module_tree import ModuleTree, same
from nusam.layers.structure import Structure
from nusam.lmo import Dense, Epsilon
from nusam.placement.in_weights import InWeights, in_weights

__all__ = ["WrittenWeights"]


class WrittenWeights:
    """Finds out which weights a copy must keep, and puts ε into the weights accordingly.

    Once written, a weight is kept by a copy whenever it is perturbed. One without an ε is kept where the ascent has
    written it, so that two passes write it once; what the forward leaves at the unperturbed weights stays.
    """

    def __init__(self) -> None:
        self._written: set[Tensor] = set()
        self._unseen: set[Tensor] = set()  # of those, which the host does not see written
        self._in_ascent: set[Tensor] = set()  # written in this step's
        self._parameters: list[Tensor] = []
        self._watchable: set[Tensor] = set()
        self._watched: list[Tensor] = []
        self._subtracted: set[Tensor] = set()  # which had no copy in the last descent
        self._late: set[Tensor] = set()
        self._check = False
        self._ascended = False
        self._watch: Watch | None = None
        self._placed: _Watched | None = None  # of the running descent

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_watch": None, "_placed": None}

    def before_ascent(self, parameters: Iterable[Tensor], check: bool, tree: ModuleTree | None = None) -> None:
        """Begin to watch; with ``check`` by norms too, which waits for the device afterwards."""
        parameters = list(parameters)
        if not same(parameters, self._parameters):
            self._parameters = parameters
            self._watched = [parameter for parameter in parameters if is_here(parameter)]
            self._watchable = set(self._watched)
        self._check, self._ascended = check, False
        if check and tree is not None:
            self._written.update(_with_maximal_norm(tree))
        self._watch = Watch(self._watched, check)

    def after_ascent(self) -> None:
        """What was written in the ascent is kept by a copy from this step's descent on."""
        watch, self._watch = self._watch, None
        self._ascended = True
        if watch is not None:
            stirred = set(watch.stirred())
            self._written |= stirred
            changed = set(watch.changed()) if self._check else set()
            self._late |= (changed - self._written) & self._subtracted
            self._written |= changed
            self._unseen |= changed - stirred
            self._in_ascent = stirred | changed

    def forget_ascent(self) -> None:
        """The next descent is no second pass."""
        self._check = self._ascended = False

    def writes(self, parameter: Tensor) -> bool:
        """Whether the model was seen to write the weight."""
        return parameter in self._written

    def in_weights(
        self,
        perturbations: Mapping[Tensor, Epsilon],
        bit_exact: bool = False,
        structure: Structure | None = None,
        others: Iterable[Tensor] = (),
        unreached: AbstractSet[Tensor] = frozenset(),
    ) -> InWeights:
        """Prepare to add each perturbation to its parameter; see :func:`nusam.placement.in_weights`.

        Args:
            perturbations: what is perturbed, and by how much.
            bit_exact: whether all of them are kept by a copy.
            structure: of the model; a step that checks has a copy at hand of what no known layer holds.
            others: parameters that may be unperturbed, and are kept all the same where the ascent has written them.
            unreached: those that the ascent was to perturb and did not reach, and so has not written.
        """
        parameters, epsilons = [*perturbations], [*perturbations.values()]
        dense = any(type(epsilon) is Dense for epsilon in epsilons)
        perturbed = set(parameters)
        copied = perturbed if bit_exact else perturbed & self._written
        spared = []
        if self._check and not dense and structure is not None:
            spared = [p for p in parameters if not (p in copied or is_sharded(p) or structure.uses_of(p))]
        written = self._in_ascent | (self._unseen - unreached) if self._ascended else set()
        kept = [p for p in others if p in written and p not in perturbed]
        self._subtracted = set() if dense else perturbed - copied - {*spared}
        watched = [] if dense else [p for p in parameters if p in self._watchable and p not in self._written]
        placed = in_weights(parameters, epsilons, copied, kept)
        self._placed = _Watched(placed, lambda: self._begin(watched), spared)
        return self._placed

    def _begin(self, watched: Sequence[Tensor]) -> None:
        self._watch = Watch(watched, self._check)

    def after_descent(self, names: Callable[[], dict[Tensor, str]]) -> None:
        """Note what was written in the descent, before its ε is taken back; warn of what came to light too late."""
        watch, self._watch = self._watch, None
        written = set()
        if watch is not None:
            written = {*watch.stirred(), *(watch.changed() if self._check else [])}
        self._written |= written
        if self._placed is not None:
            self._placed.keep(written)
            self._placed = None
        late, self._late = self._late | (written & self._subtracted), set()
        self._check = self._ascended = False
        if late:
            known = names()
            warnings.warn(
                f"The model writes {', '.join(sorted(known[parameter] for parameter in late))} in its own forward, "
                "or the loop does between backwards, which was not seen at first, so that an ε taken back after it may "
                "have left a difference; from now on a copy keeps such weights.",
                stacklevel=2,
            )


class _Watched(InWeights):
    """Watches from the moment that ε has been added.

    Of some weights it has a copy at hand, which counts only if it turns out that they were written, or if nobody got
    to see that: an ε that is taken back in the same way in every step leaves a resumed run the same to the bit.
    """

    def __init__(self, placed: InWeights, begin: Callable[[], None], spared: Sequence[Tensor]) -> None:
        self._placed, self._begin = placed, begin
        self._spared = spared
        self._copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        self._copies = {parameter: parameter.detach().clone() for parameter in self._spared}
        self._placed.add()
        self._begin()

    def keep(self, written: AbstractSet[Tensor]) -> None:
        """Restore by their copies those that were written, and no others."""
        self._copies = {parameter: copy for parameter, copy in self._copies.items() if parameter in written}

    @torch.no_grad()
    def remove(self) -> None:
        self._placed.remove()
        if self._copies:
            torch._foreach_copy_(list(self._copies), list(self._copies.values()))
            torch.clear_autocast_cache()
            self._copies = {}


def _with_maximal_norm(tree: ModuleTree) -> Iterator[Tensor]:
    for module in tree.modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            yield module.weight
