"""What is refused where DeepSpeed's engine is around the parameters."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.surroundings import Holders
from nusam.layers.module_tree import is_compiled

__all__ = ["check_engine", "check_no_engine", "check_uncompiled"]


def check_no_engine(
    parameters: Sequence[Tensor], workers: DataParallel, holders: Holders, optimizer: object = None
) -> None:
    """Whether an optimizer's parameters are its own, and no engine's, to which it may have been handed."""
    if workers.engine is not None or holders.engine(parameters, optimizer):
        raise NotImplementedError(
            "DeepSpeed steps inside its engine and keeps gradients where the two passes can't reach them; use "
            "nusam.Perturbation(engine), which wraps no optimizer."
        )


def check_engine(parameters: Sequence[Tensor], workers: DataParallel, holders: Holders) -> None:
    """Whether the engine around the parameters is known, and one that the passes can be run in."""
    if workers.engine is not None:
        workers.engine.refuse()
        check_uncompiled([workers.engine.module])
    elif holders.engine(parameters):
        raise RuntimeError(
            "The model given as model= runs inside DeepSpeed's engine, whose ascent would count as a step; pass the "
            "engine as model=."
        )


def check_uncompiled(modules: Iterable[nn.Module]) -> None:
    """Whether Python calls an engine's modules, whose graphs would hand out nothing that processes share."""
    if any(map(is_compiled, modules)):
        raise NotImplementedError(
            "A perturbation under DeepSpeed finds ε in layers that Python calls, and the engine's module is compiled, "
            "or a part of it; leave out engine.compile() and torch.compile."
        )
