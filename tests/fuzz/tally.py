"""What has been done so far, and what the library made of a step."""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


class Tally:
    """What all trials of this process have done."""

    steps = 0
    trials = 0
    doubted = 0  # steps that rounding decides: the oracle took the library's result over
    realigned = 0  # steps after which it did so since rounding had grown over many
    doings: ClassVar[Counter[str]] = Counter()
    refusals: ClassVar[Counter[str]] = Counter()
    warned: ClassVar[Counter[str]] = Counter()


@dataclass
class Outcome:
    """What the library made of the passes of one step."""

    loss: Tensor | None = None
    error: BaseException | None = None
    passes: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
