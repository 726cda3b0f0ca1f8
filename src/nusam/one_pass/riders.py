"""Samples of the next step's ascent behind those of a batch, and what they leave."""

from torch import Tensor

from nusam.ascent.layer_pass import LayerPass
from nusam.lmo import RankOne
from nusam.one_pass.apart import Apart, Mixed
from nusam.one_pass.copies import Copies
from nusam.one_pass.joint import Joint
from nusam.targets import Target

__all__ = ["Riders"]


class Riders:
    """The handlers of one step's layers, and what samples behind it leave.

    Args:
        targets: what the next step perturbs, with radii of 1 or −1.
        pass_: takes the products.
        joint: runs both losses.
        copies: makes those of small matrices, if there are to be any.
    """

    def __init__(self, targets: list[Target], pass_: LayerPass, joint: Joint, copies: Copies | None) -> None:
        self.targets, self.pass_, self.joint = targets, pass_, joint
        self._copies = copies
        self.handlers: dict[Tensor, Apart] = {}

    def of(self, forward: dict[Tensor, RankOne]) -> dict[Tensor, Apart]:
        """A handler for every matrix that has an ε in this step, or will have one in the next."""
        records = self.pass_.records
        for parameter in {**forward, **records}:
            self.handlers[parameter] = Apart(self.joint, forward.get(parameter), records.get(parameter))
        if self._copies is not None:
            for parameter, copy in self._copies.made(self.joint.rows, forward, records, self.pass_.tap).items():
                self.handlers[parameter].copies = copy
        return self.handlers

    def settle(self) -> None:
        """The backward is over: remember whose copies no layer wanted."""
        if self._copies is not None:
            self._copies.unwanted.update(p for p, handler in self.handlers.items() if handler.took_copies is False)

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

    def look_no_more(self) -> None:
        """The step itself follows."""
        for handler in self.handlers.values():
            handler.mixed = None
        self.joint.looks = None
