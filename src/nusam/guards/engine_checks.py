"""What is refused where DeepSpeed's engine is around the parameters, and of what its checkpoints hold."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.surroundings import Holders
from nusam.guards.checks import check_count, check_radius
from nusam.layers.module_tree import is_compiled

__all__ = ["check_engine", "check_no_engine", "check_saved", "check_uncompiled"]


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


def check_saved(saved: Any, is_code: Callable[[Any], bool]) -> None:
    """Whether a state dict is one of ours, as far as the model need not be asked.

    ``is_code``: whether something is what a comparison may have found.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"The state dict must be one that nusam.Perturbation's state_dict() gave, got {type(saved).__name__}."
        )
    missing = [key for key in ("rho", "steps", "matrices", "found") if key not in saved]
    if missing:
        raise ValueError(
            f"The state dict has no {missing[0]!r}, which those of nusam.Perturbation have; load one that its "
            "state_dict() gave."
        )
    check_radius(saved["rho"])
    check_count("The state dict's 'steps'", saved["steps"])
    for key, is_one in (("matrices", _is_state), ("found", is_code)):
        entries = saved[key]
        if not isinstance(entries, Mapping) or not all(map(is_one, entries.values())):
            raise ValueError(
                f"The state dict has a {key!r} that state_dict() did not give, {entries!r:.80}; load one that it gave."
            )


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
