"""Stacks of matrices: the weights of a mixture's experts in one parameter (E, n, m)."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from nusam.distributed.blocks import is_sharded
from nusam.layers.convolutions import kernels_of

__all__ = ["stacks_of"]


def stacks_of(model: nn.Module, names: Callable[[nn.Parameter], bool] | None) -> Iterator[Tensor]:
    """The parameters of three dimensions that are a matrix for each expert.

    They are those of modules whose class is called "...Experts", as in transformers 5 and torchtitan; or those that
    ``names`` says yes to. Left out are those below float32, in whose entries ε would be rounded away, and frozen and
    sharded ones.
    """
    kernels = set(kernels_of(model))
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or parameter.ndim != 3 or not parameter.numel() or parameter in kernels:
                continue
            if parameter.dtype.itemsize < 4 or not parameter.requires_grad or is_sharded(parameter):
                continue
            if names(parameter) if names else type(module).__name__.endswith("Experts"):
                yield parameter
