"""Layers whose parameters' gradients nobody needs in an ascent: norms, convolutions, layers that are no targets."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nusam.interrupts import always, remove_hook
from nusam.layers.forwards import has_foreign_forward
from nusam.layers.kinds import is_recorded, is_transformed, tapped

__all__ = ["IdleLayers"]


class IdleLayers:
    """torch's own layers without children, which compute with their parameters and with nothing else of theirs.

    Their parameters keep ``requires_grad``, and so do their outputs: a layer computes with detached parameters, and
    nothing that depends on its output, such as a re-entrant checkpoint, finds itself cut off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if type(module).__module__.startswith("torch.nn.modules.")
            and module._parameters
            and not module._modules
            and not has_foreign_forward(module)
        ]
        self._wanted: set[Tensor] = set()  # by the loss itself, as by autograd.grad(loss, norm.weight)
        self._hidden: set[Tensor] = set()  # in the running pass
        self._tap = torch.zeros((), requires_grad=True, device="cpu")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Learn inside whose gradients the loss itself asks for: these are never detached."""
        asked: dict[Tensor, int] = {}
        hooks: list[tuple[Tensor, Callable[[Tensor], None]]] = []

        def count(parameter: Tensor, by: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                asked[parameter] = asked.get(parameter, 0) + by

            return hook

        def undo() -> None:
            for parameter, hook in hooks:
                remove_hook(parameter, hook)

        with always(undo):
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    begun, complete = count(parameter, 1), count(parameter, -1)
                    hooks += [(parameter, begun), (parameter, complete)]
                    parameter.register_hook(begun)  # type: ignore[no-untyped-call]
                    parameter.register_post_accumulate_grad_hook(complete)  # type: ignore[no-untyped-call]
            yield
            self._wanted |= {p for p, times in asked.items() if times > 0}  # FSDP2 calls the second hook alone

    @contextmanager
    def detached(self, needed: set[Tensor]) -> Iterator[None]:
        """Form no gradient inside of parameters that are not needed."""
        needed = needed | self._wanted
        layers = [layer for layer in self._layers if _is_trained(layer) and needed.isdisjoint(_own(layer))]

        def undo() -> None:
            self._hidden = set()
            for layer in layers:
                vars(layer).pop("forward", None)

        with always(undo):
            self._hidden = {parameter for layer in layers for parameter in _own(layer)}
            for layer in layers:
                vars(layer)["forward"] = self._with_detached_parameters(layer)
            yield

    def need(self, parameters: set[Tensor]) -> None:
        """Form these in the running pass after all."""
        for layer in self._layers:
            own = set(_own(layer))
            if not own.isdisjoint(parameters) and own <= self._hidden:
                vars(layer).pop("forward", None)
                self._hidden -= own

    def show(self) -> None:
        """From now on all are formed: the loop looks at them."""
        self._wanted.update(self.parameters())

    def parameters(self) -> Iterator[Tensor]:
        """Those that the layers have now."""
        return (parameter for layer in self._layers for parameter in _own(layer))

    def refuse_hidden(self, inputs: Iterable[Any]) -> None:
        """Refuse a gradient that the loss itself asks for and that nobody forms in the running pass.

        Raises:
            RuntimeError: once; from then on it is formed.
        """
        hidden = [x for x in inputs if isinstance(x, Tensor) and x in self._hidden]
        if hidden:
            self._wanted.update(hidden)
            raise RuntimeError(
                f"The loss asks for the gradient of a parameter of shape {tuple(hidden[0].shape)} inside the ascent, "
                "as it did in no step before, so that its layer does not form it; take the step again, or use "
                "ascent='gradient'."
            )

    def _with_detached_parameters(self, layer: nn.Module) -> Callable[..., Any]:
        kind: Any = type(layer)  # whose forward may be patched while the pass runs

        def forward(*args: Any, **kwargs: Any) -> Any:
            return kind.forward(layer, *args, **kwargs)

        def detached(*args: Any, **kwargs: Any) -> Any:
            followed = torch.compiler.is_compiling() or is_recorded() or is_transformed()
            if followed or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            own: Any = layer._parameters
            before = dict(own)
            try:
                try:
                    own.update({name: None if p is None else p.detach() for name, p in before.items()})
                    y = kind.forward(layer, *args, **kwargs)
                finally:
                    own.update(before)
            finally:
                own.update(before)  # an interrupt may have cut the first short
            return tapped(y, self._tap) if isinstance(y, Tensor) and not y.requires_grad else y

        return detached


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def _own(layer: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in layer._parameters.values() if parameter is not None)
