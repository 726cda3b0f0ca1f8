"""Which numbers a run can have; any other is refused in one sentence."""

import math

from nusam.experiments.errors import Refused

__all__ = ["at_least", "not_negative", "part_of", "pixels_on_a_side", "shares", "some_of"]

MOST = 1e30
SIDE = 4096


def at_least(least: int, **counts: int | None) -> None:
    """Refuse a count below that; None is one that was not given."""
    for name, count in counts.items():
        if count is not None and not least <= count < 2**63:
            allowed = f"at least {least}" if count < least else "below 2^63"
            raise Refused(f"{_words(name)} must be {allowed}, got {count}.")


def not_negative(**numbers: float) -> None:
    """Refuse a number that is negative, none, or more than float32 can be multiplied with."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise Refused(f"{_words(name)} must be finite and at least 0, got {number}.")
        if number > MOST:
            raise Refused(f"{_words(name)} must be at most {MOST:g}, got {number:g}.")


def pixels_on_a_side(**sizes: int) -> None:
    """Refuse a size of images that no model here is for; 0 is none."""
    for name, size in sizes.items():
        if not 0 <= size <= SIDE:
            raise Refused(f"{_words(name)} must be at least 0 and at most {SIDE} pixels, got {size}.")


def shares(**numbers: float | None) -> None:
    """Refuse a share of the steps that leaves no step; None is one that was not given."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number < 1:
            raise Refused(f"{_words(name)} is a share of the steps and must be at least 0 and below 1, got {number}.")


def part_of(**numbers: float) -> None:
    """Refuse what is no part of a whole."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise Refused(f"{_words(name)} must be at least 0 and at most 1, got {number}.")


def some_of(**numbers: float) -> None:
    """Refuse a share that leaves nothing, or is more than all."""
    for name, number in numbers.items():
        if not 0 < number <= 1:
            raise Refused(f"{_words(name)} must be above 0 and at most 1, got {number}.")


def _words(name: str) -> str:
    return name.replace("_", " ")
