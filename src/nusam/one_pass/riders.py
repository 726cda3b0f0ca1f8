"""Samples of the next step's ascent behind those of a batch, and what they leave."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from nusam.ascent.findings import Job
from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.record import Record
from nusam.layers.reads import untold
from nusam.lmo import RankOne, State
from nusam.one_pass.apart import Apart, Mixed
from nusam.one_pass.copies import Copies, Family
from nusam.one_pass.inputs import Inputs
from nusam.one_pass.joint import Joint
from nusam.targets import Target

__all__ = ["Riders"]


class Riders:
    """The handlers of one step's layers, and what samples behind it leave.

    Args:
        targets: what the next step perturbs, with radii of 1 or −1.
        states: the warm starts of those that the samples behind serve.
        job: what a pass is to do for one of them.
        pass_: takes the products; has none to take yet.
        joint: runs both losses.
        inputs: what is remembered of those of every matrix.
    """

    def __init__(
        self,
        targets: list[Target],
        states: dict[Tensor, State],
        job: Callable[[Tensor], Job],
        pass_: LayerPass,
        joint: Joint,
        inputs: Mapping[Tensor, Inputs],
    ) -> None:
        self.targets, self.pass_, self.joint = targets, pass_, joint
        self._states, self._job, self._inputs = states, job, inputs
        self._families: list[Family] = []
        self.handlers: dict[Tensor, Apart] = {}

    def of(self, forward: dict[Tensor, RankOne]) -> dict[Tensor, Apart]:
        """A handler for every matrix that has an ε in this step, or will have one in the next."""
        for parameter in {**forward, **self._states}:
            self.handlers[parameter] = Apart(self.joint, forward.get(parameter), None, self._inputs[parameter])
        return self.handlers

    def get_ready(self, copies: Copies | None = None) -> None:
        """Let layers take their products, or multiply with the copies of small matrices if there are to be any."""
        untold(self._get_ready, copies)

    def _get_ready(self, copies: Copies | None) -> None:
        epsilons = {p: handler.epsilon for p, handler in self.handlers.items() if handler.epsilon is not None}
        self._families = [] if copies is None else copies.families(self.joint.rows, epsilons, self._states)
        copied = {}
        for family in self._families:
            copied.update(family.copies(self.pass_.tap, self.pass_.accumulates))
        records = self.pass_.records
        for parameter in copied:
            records.pop(parameter, None)
        wanted = [p for p in self._states if p not in copied and p not in records]
        self.pass_.add({parameter: self._job(parameter) for parameter in wanted})
        for parameter, handler in self.handlers.items():
            handler.record, handler.copies = records.get(parameter), copied.get(parameter)
            if handler.copies is not None:
                handler.late = partial(self._late, parameter)

    def _late(self, parameter: Tensor) -> Record | None:
        """Takes the products of a matrix whose copies its layer can't multiply with after all."""
        if parameter not in self._states:
            return None
        with torch.no_grad():
            untold(self.pass_.add, {parameter: self._job(parameter)})
        return self.pass_.records[parameter]

    def unsuited(self) -> set[Tensor]:
        """Those whose copies their layers could not multiply with, where gradients were looked at."""
        return {parameter for parameter, handler in self.handlers.items() if not handler.suits}

    def settle(self, iterations: int) -> None:
        """The backward is over: the pass knows what it has found by copies."""
        for family in self._families:
            if any(member.parameter in self.pass_.records for member in family.members):
                members, gradients = family.gradients()
                for member, gradient in zip(members, () if gradients is None else gradients, strict=True):
                    if member.state is not None:
                        if member.parameter not in self.pass_.records:
                            self._late(member.parameter)
                        self.pass_.records[member.parameter].take_formed(gradient)
            else:
                self.pass_.known.update(family.pairs(iterations))
        self.pass_.settle()

    def forget(self) -> None:
        """Begin anew: what the layers have left so far does not count."""
        self.pass_.forget()
        for handler in self.handlers.values():
            handler.is_by_itself = False
        for family in self._families:
            family.forget()

    def go_alone(self) -> None:
        """From now on this batch's samples travel alone."""
        for handler in self.handlers.values():
            handler.go_alone()

    def mixed(self, of: str) -> Mixed:
        """Let the layers look for gradients that reach the other side's samples."""
        mixed = Mixed(of)
        for handler in self.handlers.values():
            handler.mixed = mixed
        self.joint.looks = mixed.look
        return mixed

    @contextmanager
    def noting_inputs(self) -> Iterator[None]:
        """Inside, a batch is by itself, and its inputs are compared with those of the look that follows."""
        for handler in self.handlers.values():
            handler.inputs.is_noted, handler.inputs.has_shared = True, False
        yield
        for handler in self.handlers.values():
            handler.inputs.is_noted = False

    def look_no_more(self) -> None:
        """The step itself follows."""
        for handler in self.handlers.values():
            handler.mixed = None
            handler.inputs.forget()
        self.joint.looks = None
