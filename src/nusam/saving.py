"""Our state among the base optimizer's, in a state dict of the standard format.

Every parameter's entry gets our tensors under prefixed names, every group the number of steps. What belongs to
parameters outside the optimizer stands by name in the first group. A base optimizer that saves in another layout, as
those that wrap others do, has its state dict whole beside ours.
"""

import copy
import json
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from nusam.guards.checks import check_radius
from nusam.lmo import State

__all__ = ["Saved", "load_base", "merge", "own_containers", "split"]

_PREFIX = "nusam_"
_STEPS = "nusam_steps"
_OUTSIDE = "nusam_outside"
_FOUND = "nusam_found"
_FOUND_OUTSIDE = "nusam_found_outside"
_REFUSED = "nusam_one_pass_refused"
_BASE = "nusam_base"
_OURS = (_STEPS, _OUTSIDE, _FOUND, _FOUND_OUTSIDE, _REFUSED)


class Saved(NamedTuple):
    """A state dict taken apart."""

    base: dict[str, Any]  # as the base optimizer would have saved it alone
    states: dict[Tensor, State]
    outside: dict[str, State]
    steps: int
    rhos: list[float | None]  # of the groups, where the base optimizer does not save them
    found: dict[Any, str]  # what was found of a parameter's layers, by parameter or, outside of the optimizer, by name
    refused: str = ""  # why every step in one pass takes two


def own_containers(value: Any) -> Any:
    """The same tensors and numbers in dicts and lists that may be written to."""
    if isinstance(value, dict):
        mine = copy.copy(value)
        mine.update({key: own_containers(entry) for key, entry in value.items()})
        return mine
    return [own_containers(entry) for entry in value] if type(value) is list else value


def _is_standard(state_dict: dict[str, Any]) -> bool:
    """Whether it has an entry of every parameter and a list of groups, as those of ``torch.optim``."""
    groups = state_dict.get("param_groups")
    return (
        isinstance(state_dict.get("state"), dict)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and "params" in group for group in groups)
    )


def merge(
    base: dict[str, Any],
    groups: list[dict[str, Any]],
    states: dict[Tensor, State],
    outside: dict[str, State],
    steps: int,
    found: dict[Any, str] | None = None,
    refused: str = "",
) -> dict[str, Any]:
    """The base optimizer's state dict with ours in it; ``groups`` are the live ones it was made from."""
    if not _is_standard(base):
        alone = merge(_bare(groups), groups, states, outside, steps, found, refused)
        return {**alone, _BASE: base}
    state = dict(base["state"])
    for key, parameter in _keys(base, groups) if states else ():
        ours = {_PREFIX + name: value for name, value in states.get(parameter, {}).items()}
        # where some have an entry, torch.distributed.checkpoint wants one of every parameter
        state[key] = {**state.get(key, {}), **ours}
    saved_groups = [{**group, _STEPS: steps} for group in base["param_groups"]]
    if outside:
        saved_groups[0][_OUTSIDE] = outside
    if found is not None:
        for saved, group in zip(saved_groups, groups, strict=True):
            saved[_REFUSED] = refused
            saved[_FOUND] = [found.get(parameter, "") for parameter in group["params"]]
        # one value, always there: torch.distributed.checkpoint loads no number or string that a new optimizer has not
        outside_of_it = {name: code for name, code in found.items() if isinstance(name, str)}
        saved_groups[0][_FOUND_OUTSIDE] = json.dumps(outside_of_it)
    return {**base, "state": state, "param_groups": saved_groups}


def split(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Saved:
    """Take a state dict apart, which the base optimizer may as well have saved alone.

    Raises:
        ValueError: if its groups are not as many, or not as large, as the live ones, or if our entries were dropped.
    """
    if _BASE in state_dict:
        alone = split({name: value for name, value in state_dict.items() if name != _BASE}, groups)
        return alone._replace(base=state_dict[_BASE], rhos=[group["rho"] for group in state_dict["param_groups"]])
    if not _is_standard(state_dict):
        return Saved(state_dict, {}, {}, 0, [None] * len(groups), {})
    saved_groups = state_dict["param_groups"]
    if any("rho" in group and _STEPS not in group for group in saved_groups):
        raise ValueError(
            "The state dict has lost nusam's own entries, as flatten_optimizer_state_dict=True makes it; save and load "
            "it as opt.state_dict() gives it."
        )
    for group in saved_groups:
        check_radius(group.get("rho", 0))
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
    bare = [{name: value for name, value in g.items() if name not in _OURS} for g in saved_groups]
    found: dict[Any, str] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        found |= dict(zip(group["params"], saved.get(_FOUND, ()), strict=False)) | json.loads(
            saved.get(_FOUND_OUTSIDE, "{}")
        )
    return Saved(
        base={**state_dict, "state": state, "param_groups": bare},
        states=states,
        outside={name: s for group in saved_groups for name, s in group.get(_OUTSIDE, {}).items()},
        steps=max((group.get(_STEPS, 0) for group in saved_groups), default=0),
        rhos=[None] * len(groups),
        found=found,
        refused=next((group[_REFUSED] for group in saved_groups if group.get(_REFUSED)), ""),
    )


def load_base(base: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load what the base optimizer saved, in its own layout.

    Raises:
        ValueError: if the layout is another optimizer's.
    """
    kind = type(base).__name__
    if not _is_standard(state_dict) and _is_standard(base.state_dict()):
        raise ValueError(
            f"The state dict has no 'state' and 'param_groups' as those of {kind}; load one of the same base optimizer."
        )
    try:
        base.load_state_dict(state_dict)
    except KeyError as error:
        raise ValueError(
            f"The state dict has no {error}, which {kind} needs; load one of the same base optimizer."
        ) from error


def _bare(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict of the standard format with nothing but the groups' parameters and radii."""
    ends = list(accumulate(len(group["params"]) for group in groups))
    return {
        "state": {},
        "param_groups": [
            {"params": list(range(end - len(group["params"]), end)), "rho": group["rho"]}
            for group, end in zip(groups, ends, strict=True)
        ],
    }


def _keys(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[tuple[Any, Tensor]]:
    """The key of every parameter in a state dict of the same groups."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)
