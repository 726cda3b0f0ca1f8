"""Which matrices may be served without their gradient: those whose layers' products were seen to agree with it.

Loops change, so the comparison is made again 2, 4, 8, … perturbed steps after the first, and when it is asked for.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nusam.ascent.parts import by_gradient, by_layers
from nusam.ascent.record import Record
from nusam.distributed.blocks import is_sharded
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Ranks
from nusam.norms import norm_of
from nusam.power_iteration import Explicit, as_matrix

__all__ = ["BESIDE", "IN_A_GRAPH", "ONE_USE", "SEVERAL_USES", "Verdict", "Verification", "compared", "is_code"]

ONE_USE = "one use"  # the products of a single use of its layer are those of its gradient
SEVERAL_USES = "several uses"  # the sum over all uses of its layers is
OTHERWISE = "otherwise"  # it has uses that no layer sees, for good
CHANGED = "changed"  # its products are right, but the loop looks at its gradient in the passes; for good

_ROUNDING = 64.0  # rounding units of what was summed, below which a gradient that cancels says nothing
IN_A_GRAPH = "used repeatedly in a graph"
BESIDE = "also used outside its layer"


class Verdict(NamedTuple):
    """What a comparison found of one matrix, and why it is not served if it is not."""

    found: str
    reason: str


class Verification:
    """What the comparisons of a run have found, and when the next one is due."""

    def __init__(self) -> None:
        self.found: dict[Tensor, Verdict] = {}
        self._age: int | None = None  # perturbed steps since the first comparison that saw a gradient
        self._asked = False
        self._modes: tuple[bool, ...] | None = None

    def of(self, parameter: Tensor) -> str | None:
        """What is known of the matrix, if anything is."""
        verdict = self.found.get(parameter)
        return verdict and verdict.found

    @property
    def reasons(self) -> dict[Tensor, str]:
        """Why matrices are not served by their layers."""
        return {p: verdict.reason for p, verdict in self.found.items() if verdict.reason}

    def ask(self) -> None:
        """Compare everything anew in the next step: something has changed."""
        self._asked = True

    def watch(self, modes: tuple[bool, ...]) -> None:
        """Compare anew if the modules' modes (training or not) are others than before."""
        if self._modes is not None and modes != self._modes:
            self.ask()
        self._modes = modes

    def is_due(self) -> bool:
        """Whether what is known is compared again in this step."""
        age = self._age
        return self._asked or age is None or (age > 1 and age & (age - 1) == 0)

    def advance(self) -> None:
        """A perturbed step was taken."""
        self._asked = False
        if self._age is not None:
            self._age += 1
        elif self.found:
            self._age = 1

    def learn(self, verdicts: dict[Tensor, Verdict]) -> None:
        """What was seen once to go otherwise stays so."""
        for parameter, verdict in verdicts.items():
            if self.of(parameter) not in (OTHERWISE, CHANGED):
                self.found[parameter] = verdict

    def refuse(self, reasons: dict[Tensor, str]) -> None:
        """Never serve these again."""
        self.learn({parameter: Verdict(OTHERWISE, reason) for parameter, reason in reasons.items()})

    def leave_gradients(self, parameters: Iterable[Tensor], why: str = "changed") -> None:
        """Never serve these again: the loop changes their gradients, or looks at them and may do so."""
        self.learn(dict.fromkeys(parameters, Verdict(CHANGED, f"{why} by the loop in the passes")))

    def forget(self, parameter: Tensor) -> None:
        """Compare a matrix anew before it is served again."""
        self.found.pop(parameter, None)

    def serve_by_sum(self, parameter: Tensor, reason: str) -> None:
        """Serve a matrix that has no gradient by the sum over its uses."""
        self.found[parameter] = Verdict(SEVERAL_USES, reason)

    def codes(self) -> list[tuple[Tensor, str]]:
        """What to save of every matrix."""
        return [(parameter, f"{verdict.found}: {verdict.reason}") for parameter, verdict in self.found.items()]

    def load(self, codes: dict[Tensor, str]) -> None:
        """Take over what was saved; all of it is compared again in the next step."""
        pieces = ((parameter, code.split(": ", 1)) for parameter, code in codes.items() if code)
        self.found = {parameter: Verdict(*verdict) for parameter, verdict in pieces}
        self._age = 1 if self.found else None
        self.ask()


def is_code(code: object) -> bool:
    """Whether it is one of :meth:`Verification.codes`."""
    found, colon, _ = code.partition(": ") if isinstance(code, str) else ("", "", "")
    return bool(colon) and found in (ONE_USE, SEVERAL_USES, OTHERWISE, CHANGED)


def compared(records: Sequence[Record], workers: DataParallel, everyone: DataParallel) -> dict[Tensor, Verdict]:
    """What a pass has found of the matrices that it checked, where it saw a gradient; waits for the device.

    Compared are Gᵀr by the layers and by the gradient, for a random r: two matrices that differ anywhere differ there.

    Args:
        records: what the pass has of each.
        workers: the processes that share the pass.
        everyone: all processes that split the batch, over which gradients may be averaged already.
    """
    together: Ranks | None = None
    reached = [record for record in records if record.gradient is not None or record.gradient_checked is not None]
    if workers.splits_the_batch or any(is_sharded(record.parameter) for record in records):
        by_uses, by_gradients, together = _joint(records, everyone)
        reached = list(records)  # the others may have reached what this process did not
    else:
        by_uses = [_or_zeros(record.products_of_uses(), record) for record in reached]
        by_gradients = [_gradient_times_r(record) for record in reached]
    if not reached:
        return {}
    device = by_uses[0].device
    sizes = [
        torch.stack([norm_of(a - b).float(), norm_of(b).float()]).to(device)
        for a, b in zip(by_uses, by_gradients, strict=True)
    ]
    facts = [_facts(record) for record in reached]
    if together is not None:
        together.max_(facts)  # all processes must come to one verdict
    rows = torch.stack([torch.cat([size, fact.to(device)]) for size, fact in zip(sizes, facts, strict=True)]).tolist()
    verdicts = {}
    for record, (difference, size, tolerance, rounding, *known) in zip(reached, rows, strict=True):
        if math.isfinite(size) and size > rounding:
            agrees = difference <= tolerance * size + rounding
            verdicts[record.parameter] = _verdict(record, agrees, *map(round, known))
    return verdicts


def _facts(record: Record) -> Tensor:
    """What this process saw of the matrix, the more the less it is to be trusted."""
    seen = (record.completed, record.wanted_elsewhere, record.in_pieces, record.is_altered, record.is_rounded)
    known = [_tolerance(record), *map(float, seen)]
    rounding = record.u.new_zeros(1) if record.scale is None else _ROUNDING * record.scale.reshape(1).to(record.u)
    rounding = rounding * torch.finfo(record.u.dtype).eps
    facts = record.u.new_tensor(known)
    return torch.cat([facts[:1], rounding, facts[1:], record.count().reshape(1).to(record.u.dtype)]).float()


def _verdict(
    record: Record,
    agrees: bool,
    completed: int,
    wanted_elsewhere: int,
    in_pieces: int,
    is_altered: int,
    is_rounded: int,
    count: int,
) -> Verdict:
    if wanted_elsewhere:
        return Verdict(OTHERWISE, "asked for its gradient inside the loss")
    if is_rounded:
        return Verdict(OTHERWISE, "rounded by its layer before it is used")
    if is_altered:
        return Verdict(SEVERAL_USES, "computed by another function than torch's")
    if in_pieces:
        return Verdict(SEVERAL_USES if agrees else OTHERWISE, "reached in pieces or by another way")
    if not agrees:
        return Verdict(OTHERWISE, BESIDE if count else "reached in pieces or by another way")
    if not is_sharded(record.parameter) and record.leaf.is_leaf and not completed:
        return Verdict(OTHERWISE, "given its gradient by the loop itself")
    if count == 1 and completed <= 1:
        return Verdict(ONE_USE, "")
    if record.job.keeps:  # and can be summed
        return Verdict(SEVERAL_USES, "")
    return Verdict(SEVERAL_USES, IN_A_GRAPH if record.probed is not None else f"used {count} times")


def _joint(records: Sequence[Record], everyone: DataParallel) -> tuple[list[Tensor], list[Tensor], Ranks]:
    """Both products over all processes, in one collective: gradients may be summed or averaged already.

    And the processes that had a part in each matrix.
    """
    products, routes = [], []
    for record in records:
        if record.kept:
            matrix, route = by_layers(record.parameter, record, everyone, in_summands=True)
            products.append(matrix.rmatvec(_r(record)))
        else:
            here = everyone.averaged(everyone.block(record.parameter, in_layer=True), record.parameter)
            products.append(_or_zeros(record.products_of_uses(), record) * here.share)
            route = here.route
        routes.append(route)
    for record in records:
        found = by_gradient(record.parameter, record.gradient, everyone, in_summands=True)
        here = everyone.averaged(everyone.block(record.parameter, in_layer=True), record.parameter)
        products.append(_or_zeros(found and found[0].rmatvec(_r(record)), record))
        routes.append(found[1] if found else here.route)
    Ranks(routes).sum_(products)
    return products[: len(records)], products[len(records) :], Ranks(routes[: len(records)])


def _gradient_times_r(record: Record) -> Tensor:
    if record.gradient_checked is not None:
        return record.gradient_checked
    gradient = record.gradient
    assert gradient is not None
    return Explicit(as_matrix(gradient).to(record.u.dtype)).rmatvec(_r(record))


def _or_zeros(product: Tensor | None, record: Record) -> Tensor:
    return record.u.new_zeros(record.block.shape[1]) if product is None else product.to(record.u.device)


def _r(record: Record) -> Tensor:
    assert record.r is not None
    return record.r


def _tolerance(record: Record) -> float:
    """By how much Gᵀr may differ between two ways that round differently, relative to its norm."""
    return 1e3 * record.coarsest if record.coarsest < 1e-4 else 0.1
