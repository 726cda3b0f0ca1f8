"""Our state among the base optimizer's, in a state dict of the standard format.

Every parameter's entry gets our tensors under prefixed names, every group the number of steps. What belongs to
parameters outside the optimizer stands by name in the first group.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from nusam.lmo import State

__all__ = ["Saved", "merge", "split"]

_PREFIX = "nusam_"
_STEPS = "nusam_steps"
_OUTSIDE = "nusam_outside"


class Saved(NamedTuple):
    """A state dict taken apart."""

    base: dict[str, Any]  # as the base optimizer would have saved it alone
    states: dict[Tensor, State]
    outside: dict[str, State]
    steps: int


def merge(
    base: dict[str, Any],
    groups: list[dict[str, Any]],
    states: dict[Tensor, State],
    outside: dict[str, State],
    steps: int,
) -> dict[str, Any]:
    """The base optimizer's state dict with ours in it; ``groups`` are the live ones it was made from."""
    state = dict(base["state"])
    for key, parameter in _keys(base, groups) if states else ():
        ours = {_PREFIX + name: value for name, value in states.get(parameter, {}).items()}
        # where some have an entry, torch.distributed.checkpoint wants one of every parameter
        state[key] = {**state.get(key, {}), **ours}
    saved_groups = [{**group, _STEPS: steps} for group in base["param_groups"]]
    if outside:
        saved_groups[0][_OUTSIDE] = outside
    return {**base, "state": state, "param_groups": saved_groups}


def split(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Saved:
    """Take a state dict apart, which the base optimizer may as well have saved alone.

    Raises:
        ValueError: if its groups are not as many, or not as large, as the live ones, or if our entries were dropped.
    """
    saved_groups = state_dict["param_groups"]
    if any("rho" in group and _STEPS not in group for group in saved_groups):
        raise ValueError(
            "The state dict has lost nusam's own entries, as flatten_optimizer_state_dict=True makes it; save and load "
            "it as opt.state_dict() gives it."
        )
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        raise ValueError(
            "The state dict's parameter groups don't match the optimizer's in number or size; "
            "build the optimizer from the same groups before loading."
        )
    state: dict[Any, Any] = dict(state_dict["state"])
    states: dict[Tensor, State] = {}
    for key, parameter in _keys(state_dict, groups):
        entries = state.pop(key, {})
        ours = {name: value for name, value in entries.items() if str(name).startswith(_PREFIX)}
        rest = {name: value for name, value in entries.items() if name not in ours}
        if rest:
            state[key] = rest
        if ours:
            states[parameter] = {name.removeprefix(_PREFIX): value for name, value in ours.items()}
    bare = [{name: value for name, value in g.items() if name not in (_STEPS, _OUTSIDE)} for g in saved_groups]
    return Saved(
        base={**state_dict, "state": state, "param_groups": bare},
        states=states,
        outside={name: s for group in saved_groups for name, s in group.get(_OUTSIDE, {}).items()},
        steps=max((group.get(_STEPS, 0) for group in saved_groups), default=0),
    )


def _keys(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[tuple[Any, Tensor]]:
    """The key of every parameter in a state dict of the same groups."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)
