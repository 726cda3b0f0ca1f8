"""Gradients of the model's parameters that another optimizer takes: only a step's descent is to add to them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from nusam.distributed.data_parallel import DataParallel
from nusam.interrupts import always
from nusam.layers.module_tree import ModuleTree, same

__all__ = ["Others"]


class Holder(Protocol):
    """An optimizer of ours."""

    def _parameters(self) -> list[Tensor]: ...


class Others:
    """The parameters of a model that its optimizer does not hold, found again where the model or the groups change.

    Args:
        tree: of the model, if there is one.
    """

    def __init__(self, tree: ModuleTree | None) -> None:
        self._tree = tree
        self._walks = 0
        self._held: Sequence[Tensor] = ()
        self._found: list[Tensor] = []

    def trained(self, held: Sequence[Tensor], workers: DataParallel, anew: bool = False) -> list[Tensor]:
        """Those that are trained now.

        Args:
            held: by the optimizer.
            workers: know what stands for a parameter between the passes.
            anew: whether to find them in any case.
        """
        if self._tree is None:
            return []
        if anew or self._walks != self._tree.walks or not same(held, self._held):
            ours = set(held)
            everything = dict.fromkeys(map(workers.stored, self._tree.parameters()))
            self._found = [parameter for parameter in everything if parameter not in ours]
            self._walks, self._held = self._tree.walks, list(held)
        return [parameter for parameter in self._found if parameter.requires_grad]

    @contextmanager
    def put_away(
        self, held: Sequence[Tensor], workers: DataParallel, anew: bool, running: Sequence[Holder]
    ) -> Iterator[None]:
        """Inside they begin without gradients; afterwards they have those that they had.

        Those of another optimizer of ours that is inside a pass itself, ``running``, are left to it.
        """
        parameters = self.trained(held, workers, anew)
        if running:
            theirs = {parameter for other in running for parameter in other._parameters()}
            parameters = [parameter for parameter in parameters if parameter not in theirs]
        before = [workers.kept(parameter.grad) for parameter in parameters]

        def undo() -> None:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

        with always(undo):
            for parameter in parameters:
                parameter.grad = None
            yield
