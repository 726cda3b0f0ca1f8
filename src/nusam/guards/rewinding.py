"""The batch of a loop's passes, which every pass finds as the first one found it."""

from collections.abc import MutableMapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nusam.containers import entries_of, is_a_dataclass, is_container, is_list, is_list_of_plain
from nusam.guards.batch_copies import BatchCopies

__all__ = ["Rewinding"]


class Rewinding:
    """Takes back what a pass did to its batch: entries taken out or bound anew, tensors written in place.

    Tensors are copied until a step has been seen to leave them alone.
    """

    def __init__(self) -> None:
        self._copies = BatchCopies("The loop over passes()")
        self._forget()

    def _forget(self) -> None:
        self._looked = False
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[Tensor, int, Tensor | None]] = {}

    @torch.no_grad()
    def keep(self, batch: Any) -> None:
        """The first pass begins."""
        self._forget()
        self._keep(batch)

    @torch.no_grad()
    def rewind(self) -> None:
        """Another pass begins, after one that is over.

        Raises:
            Written: if the pass before wrote into a tensor of which there is no copy.
        """
        self._looked = True
        for tensor, version, before in self._tensors.values():
            if tensor._version == version:
                continue
            self._copies.note(wrote=True)
            if before is not None:  # else the note has raised
                tensor.copy_(before)
        for container, before in self._containers:
            _refill(container, before)

    def end(self) -> None:
        """There are no more passes."""
        if self._looked:
            self._copies.step_is_over()
        self._forget()

    def _keep(self, part: Any) -> None:
        if isinstance(part, Tensor):
            if id(part) not in self._tensors and not part.is_inference():
                self._tensors[id(part)] = part, part._version, part.clone() if self._copies.are_made else None
            return
        before = _contents(part)
        if before is not None:
            self._containers.append((part, before))
        if is_container(part) and not (is_list(part) and is_list_of_plain(part)):  # tokens, perhaps many
            for entry in entries_of(part):
                self._keep(entry)


def _contents(part: Any) -> Any:
    """What a container that can be written to holds; None of others."""
    if isinstance(part, MutableMapping):
        return dict(part)
    if type(part) is list:
        return list(part)
    if is_a_dataclass(part):
        return {field.name: getattr(part, field.name, None) for field in fields(part)}
    return None


def _refill(container: Any, before: Any) -> None:
    """Give a container the entries that it had."""
    if isinstance(container, list):
        if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container[:] = before
        return
    if isinstance(container, MutableMapping):
        if list(container) != list(before) or any(container[name] is not value for name, value in before.items()):
            container.clear()
            container.update(before)
        return
    for name, value in before.items():
        if getattr(container, name, None) is not value:
            object.__setattr__(container, name, value)
