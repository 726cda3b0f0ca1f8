"""The modules of a model whose calls two batches share, as long as the model stays what it is."""

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, nn

from nusam.layers.kinds import Embedding
from nusam.layers.structure import Structure
from nusam.one_pass.inputs import Inputs
from nusam.one_pass.joining import Roles
from nusam.one_pass.joint import joinable

__all__ = ["Joined"]

Passes = Sequence[dict[nn.Module, list[int | None]]]


class Joined:
    """What is known of the modules of one structure."""

    def __init__(self) -> None:
        self.structure: Structure | None = None  # of the model when they were found
        self.modules: list[nn.Module] = []
        self.inputs: dict[Tensor, Inputs] = defaultdict(Inputs)
        self.roles: dict[tuple[nn.Module, int], Roles] = {}  # of the arguments of their calls
        self._passes: Passes = []

    def learn(self, structure: Structure | None, passes: Passes) -> None:
        """Find them, by what passes of several numbers of samples have shown."""
        self.structure, self._passes = structure, passes
        self.inputs.clear()
        self.roles.clear()
        self.modules = self._outermost(set())

    def has_tables(self) -> bool:
        """Whether a layer may be looked up by a vector, whose length does not tell samples from what they share."""
        return self.structure is not None and any(use.kind is Embedding for use in self.structure.uses)

    def narrow(self) -> bool:
        """Leave out those with a layer whose input all samples share: each side then calls it by itself.

        Whether that leaves others than before.
        """
        shared = {parameter for parameter, inputs in self.inputs.items() if inputs.has_shared}
        narrower = self._outermost(shared) if shared else []
        if not narrower or narrower == self.modules:
            return False
        self.modules = narrower
        return True

    def _outermost(self, shared: set[Tensor]) -> list[nn.Module]:
        assert self.structure is not None
        model = self.structure.model
        around = {m for m in model.modules() if not shared.isdisjoint(m.parameters())} if shared else set()
        passes = [{module: calls for module, calls in seen.items() if module not in around} for seen in self._passes]
        return joinable(model, passes)
