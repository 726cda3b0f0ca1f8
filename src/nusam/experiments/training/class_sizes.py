"""How many examples a class must have, so that some can be kept for validation."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nusam.experiments.errors import Refused

__all__ = ["require_two_of_each", "with_every_class"]


def require_two_of_each(data: str, labels: Sequence[str], otherwise: str = "") -> None:
    """Refuse labels of training examples of which validation would take all that a class has, or none at all."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise Refused(f"--data {data} needs at least two classes to train with, and has only {labels[0]}; add another.")
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < 2:
        raise Refused(
            f"--data {data} needs at least two training examples of each class, as some are kept for validation, and "
            f"{rarest} has one; add more{otherwise}."
        )


def with_every_class(order: NDArray[np.int64], labels: NDArray[Any], count: int, least: int = 1) -> NDArray[np.int64]:
    """The order, changed so far that its first ``count`` have at least ``least`` examples of each class.

    A class that has fewer has all of them there. Where so few have no room for all classes, the order stays, and so
    it does for scores, which have no classes.
    """
    if np.issubdtype(labels.dtype, np.floating):
        return order
    wanted = np.minimum(np.bincount(labels), least)
    if wanted.sum() > count:
        return order
    order = order.copy()
    has = np.bincount(labels[order[:count]], minlength=len(wanted))
    for label in np.flatnonzero(has < wanted):
        behind = count + np.flatnonzero(labels[order[count:]] == label)
        for place in behind[: wanted[label] - has[label]]:
            spared = np.argmax(has - wanted)
            given = np.flatnonzero(labels[order[:count]] == spared)[-1]
            order[[given, place]] = order[[place, given]]
            has[spared] -= 1
    return order
