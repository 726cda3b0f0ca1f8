"""What is refused where DeepSpeed's engine is around the parameters."""

from collections.abc import Sequence

from torch import Tensor

from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.surroundings import Holders

__all__ = ["check_engine", "check_no_engine"]


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
    elif holders.engine(parameters):
        raise RuntimeError(
            "The model given as model= runs inside DeepSpeed's engine, whose ascent would count as a step; pass the "
            "engine as model=."
        )
