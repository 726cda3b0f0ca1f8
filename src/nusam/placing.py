"""Where each ε lives, which the model and the weights decide anew whenever they change."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nusam.distributed.blocks import is_sharded
from nusam.distributed.data_parallel import DataParallel
from nusam.guards.checks import check_model, check_module
from nusam.guards.model_guard import ModelGuard
from nusam.interrupts import always
from nusam.layers.kinds import held
from nusam.layers.structure import Structure
from nusam.lmo import Nuclear
from nusam.resuming import Resumable
from nusam.wrapper import itself

__all__ = ["Placing"]


class Placing(Resumable):
    """An optimizer that knows which of its ε live in the forward of which layers."""

    _structure: Structure | None
    _guard: ModelGuard
    _apart = False  # whether gradients and weights are somebody else's, and no pass touches them

    @property
    def model(self) -> nn.Module | None:
        """The module being trained; another one that holds its parameters too, such as a wrapper, may take its place.

        Raises:
            RuntimeError: if there was none, or is to be none, or inside a pass.
            TypeError, ValueError: if it is no module that holds parameters of the optimizer.
        """
        return itself(self)._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self = itself(self)
        if model is self._model:
            return
        self._refuse_inside_pass("setting model")
        if model is None or self._model is None:
            raise RuntimeError("The model is given when the optimizer is built, and let go of by its detach().")
        check_module(model)
        check_model(model, [] if self._apart else self._parameters())
        self._model, self._guard = model, ModelGuard(model)

    def detach(self) -> None:
        """Let go of the model for good: the ascent computes gradients, nothing of the model is guarded.

        Between passes the model carries no trace of the optimizer anyway, except the hooks of
        :func:`step_in_backward`, which are removed.

        Raises:
            RuntimeError: inside a pass, or if parameters outside the optimizer are perturbed.
        """
        self = itself(self)
        self._refuse_inside_pass("detach()")
        sharded = any(is_sharded(parameter) for parameter in self._parameters())
        if self.targets != "trainable" or self.placement == "forward" or self.m_sam is not False or sharded:
            raise RuntimeError(
                "detach() would leave targets, placement, m_sam or sharded parameters without the model they need; "
                "build an optimizer with targets='trainable', placement='auto' and m_sam=False instead."
            )
        if self._in_backward is not None:
            self._in_backward.remove()
        self._in_backward = self._model = self._ascent.serve_from = None
        self._guard = ModelGuard(None)

    def _check_targets(self) -> None:
        """Refuse what can't be perturbed, before anything is."""
        raise NotImplementedError

    def _structure_now(self) -> Structure | None:
        """Where the model uses its matrices, found anew if it has changed."""
        if self.model is None:
            return None
        known = self._structure
        if known is None or known.model is not self.model or not known.is_current():
            self._structure = known = Structure(self.model)
            self._ascent.verification.ask()
            self._check_targets()
        return known

    def _in_forward(self, parameter: Tensor) -> bool:
        if self.placement == "auto":
            own_of_a_shard = self.m_sam is not False and is_sharded(parameter)
            needed = held(parameter).dtype.itemsize < 4 or not parameter.requires_grad or own_of_a_shard
            return needed and self.model is not None and isinstance(self.lmo, Nuclear)
        return self.placement == "forward"

    @contextmanager
    def _all_in_forward(self) -> Iterator[None]:
        """Inside, every ε lives in the forward."""
        own, before = vars(self), self.placement

        def undo() -> None:
            own["placement"] = before

        with always(undo):
            own["placement"] = "forward"
            yield

    def _everyone(self, workers: DataParallel) -> DataParallel:
        return workers if self.m_sam is False else DataParallel(self.model)
