"""How many examples a class must have, so that some can be kept for validation."""

from collections import Counter
from collections.abc import Sequence

from nusam.experiments.errors import Refused

__all__ = ["require_two_of_each"]


def require_two_of_each(data: str, labels: Sequence[str]) -> None:
    """Refuse labels of training examples of which validation would take all that a class has, or none at all."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise Refused(f"--data {data} needs at least two classes to train with, and has only {labels[0]}; add another.")
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < 2:
        raise Refused(
            f"--data {data} needs at least two training examples of each class, as some are kept for validation, and "
            f"{rarest} has one; add more."
        )
