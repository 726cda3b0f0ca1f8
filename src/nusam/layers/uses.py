"""Where modules use their matrices, and how a pass gets between a module and its function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nusam.distributed.blocks import is_sharded
from nusam.interrupts import always
from nusam.layers.attention import HANDLER, attend, places_of, sharded_attention
from nusam.layers.convolutions import convolution_of, given
from nusam.layers.forwards import has_foreign_forward, has_our_forward
from nusam.layers.kinds import Conv1D, Embedding, Handler, Kind, Linear, Own, as_published, is_recorded
from nusam.layers.reads import Watched, untold
from nusam.lmo import matrix_shape

__all__ = ["Use", "find_uses", "rerouted"]


_PLAIN_TABLE = (None, False, False)


class Use(NamedTuple):
    """One parameter as one module uses it."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    kind: type[Kind]
    forward: Any  # the function that its class computes with
    given: tuple[Any, ...] = ()  # what the layer goes by beside its parameters

    def is_current(self) -> bool:
        """Whether the module still uses the parameter so."""
        module = self.module
        return (
            module._parameters.get(self.name) is self.parameter
            and type(module).forward is self.forward
            and not has_foreign_forward(module)
            and self.goes_by_the_same()
        )

    def goes_by_the_same(self) -> bool:
        """Whether all that a convolution or a table goes by is as it was found."""
        return not self.given or self.given == (_of_table if self.kind is Embedding else given)(self.module)

    def is_followed(self) -> bool:
        """Whether a call in a pass is one that was known when it began, and not a recording of torch.jit."""
        same = type(self.module).forward is self.forward and self.goes_by_the_same()
        return same and not is_recorded()


def find_uses(model: nn.Module) -> Iterator[Use]:
    """Every matrix of the model that reaches its input through a layer whose forward is known."""
    linear, embedding, attention = map(as_published, (nn.Linear, nn.Embedding, nn.MultiheadAttention))
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        if has_foreign_forward(module):
            continue
        if forward is linear:
            yield from _uses(module, ("weight",), Linear)
        elif forward is embedding and _of_table(module) == _PLAIN_TABLE:
            yield from (use._replace(given=_PLAIN_TABLE) for use in _uses(module, ("weight",), Embedding))
        elif forward is attention:
            yield from _uses(module, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), Linear)
        elif isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
            yield from (use for use in _uses(module, ("weight",), Own) if not use.parameter.requires_grad)
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            yield from _uses(module, ("weight",), Conv1D)
        elif (convolution := convolution_of(module)) is not None:
            yield from (use._replace(given=given(module)) for use in _uses(module, ("weight",), convolution))


def _uses(module: nn.Module, names: tuple[str, ...], kind: type[Kind]) -> Iterator[Use]:
    for name in names:
        parameter = module._parameters.get(name)
        if isinstance(parameter, nn.Parameter) and len(matrix_shape(parameter)) == 2:
            yield Use(module, name, parameter, kind, type(module).forward)


@contextmanager
def rerouted(uses: list[Use], handlers: dict[Tensor, Handler]) -> Iterator[None]:
    """Inside, each use of a parameter with a handler goes through it; the modules are as found afterwards.

    The forward is replaced on the instance: a thread-local mode would be missed by activation checkpointing,
    a class swap would fight those of other libraries, and torch.compile guards on the replacement.

    Raises:
        RuntimeError: if another pass that runs has replaced one of these forwards.
    """
    forwards = {use.module: _forward(use, handlers) for use in uses if _is_handled(use, handlers)}
    if any(map(has_our_forward, forwards)) or any(HANDLER in vars(parameter) for parameter in handlers):
        raise RuntimeError(
            "Two optimizers whose passes run at once reach into the same layer's forward; let one of them hold all "
            "weights of a layer, or run their passes one after the other."
        )

    def undo() -> None:
        for module, forward in forwards.items():
            if vars(module).get("forward") is forward:  # else somebody has replaced it in the pass
                vars(module).pop("forward", None)
        for parameter in handlers:
            vars(parameter).pop(HANDLER, None)

    with always(undo):
        for parameter, handler in handlers.items():
            setattr(parameter, HANDLER, handler)
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield


def _is_handled(use: Use, handlers: dict[Tensor, Handler]) -> bool:
    """Whether the module's forward uses a parameter with a handler; an attention multiplies with two of them itself."""
    module = use.module
    return use.parameter in handlers or (
        isinstance(module, nn.MultiheadAttention) and module.out_proj.weight in handlers
    )


def _forward(use: Use, handlers: dict[Tensor, Handler]) -> Callable[..., Any]:
    module: Any = use.module
    if isinstance(module, nn.MultiheadAttention):
        # It hands its projections' weights to F.linear itself, out_proj's included: so its functions run with an
        # F.linear of ours, which finds the handler on the weight.
        if is_sharded(use.parameter):
            return partial(sharded_attention, module, places_of(module, handlers))

        def attention(*args: Any, **kwargs: Any) -> Any:
            if not use.is_followed():
                return type(module).forward(module, *args, **kwargs)
            weights = (*module._parameters.values(), module.out_proj.weight)
            if torch.compiler.is_compiling() or not any(type(W) is Watched for W in weights):
                return attend(module, *args, **kwargs)
            return untold(attend, module, *args, **kwargs)

        return attention
    kind, handler, own, parameter = use.kind, handlers[use.parameter], module.forward, use.parameter
    sharded = is_sharded(parameter)  # then FSDP2 puts what it gathered in its place

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not use.is_followed():
            return type(module).forward(module, *args, **kwargs)
        W = module.weight
        if len(args) + len(kwargs) != 1 or not (W is parameter or (sharded and isinstance(W, nn.Parameter))):
            return own(*args, **kwargs)  # torch.func.functional_call has put something else in the weight's place
        # whoever keeps this function beyond the pass finds what is there by then
        current = handler if torch.compiler.is_compiling() else vars(parameter).get(HANDLER)
        if current is None:
            return type(module).forward(module, *args, **kwargs)
        (x,) = (*args, *kwargs.values())
        extra = _padding(module) if kind is Embedding else own if kind is Own else module.bias
        return kind.call(current, x, W, extra)

    return forward


def _of_table(table: Any) -> tuple[Any, ...]:
    """All that a table goes by beside its weight and the row without a gradient."""
    return table.max_norm, table.scale_grad_by_freq, table.sparse


def _padding(table: Any) -> int | None:
    """The row that gets no gradient, if any; torch counts from the end too, whoever has set it so."""
    index: int | None = table.padding_idx
    return index + table.weight.shape[0] if index is not None and index < 0 else index
