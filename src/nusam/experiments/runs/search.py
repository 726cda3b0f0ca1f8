"""A number that validation accuracy chooses, with no grid whose end it could lie at."""

from collections.abc import Callable, Iterable
from statistics import fmean

from nusam.experiments.runs.store import Cell, Store

__all__ = ["Search", "accuracy", "carried_out"]


class Search:
    """For the value with the best validation accuracy, over the runs that each value has.

    It moves by factors of 2 until both neighbours are worse; of equal ones it takes the smallest.

    Args:
        start: where it begins.
        cells: the runs of a value.
        least: below which it does not go.
    """

    def __init__(self, start: float, cells: Callable[[float], list[Cell]], least: float = 0.0) -> None:
        self.found, self._cells, self._least = start, cells, least

    def wanted(self, store: Store) -> list[Cell]:
        """Runs that the next move needs, after all moves that are possible; none at the end."""
        while True:
            values = [value for value in (self.found, self.found / 2, self.found * 2) if value >= self._least]
            cells = {value: self._cells(value) for value in values}
            missing = [cell for group in cells.values() for cell in group if cell not in store]
            if missing:
                return missing
            found = max(values, key=lambda value: (accuracy(store, cells[value]), -value))
            if found == self.found:
                return []
            self.found = found


def accuracy(store: Store, cells: Iterable[Cell]) -> float:
    """Mean validation accuracy."""
    return fmean(store[cell].validation_accuracy for cell in cells)


def carried_out(searches: list[Search], store: Store, fill: Callable[[list[Cell]], None]) -> None:
    """Carry all of them to their ends, side by side."""
    while wanted := [cell for search in searches for cell in search.wanted(store)]:
        fill(wanted)
