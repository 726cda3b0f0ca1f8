"""A number that validation accuracy chooses: from a grid, or with none whose end it could lie at."""

from collections.abc import Callable, Iterable, Sequence
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
        grid: the values that are tried instead; of a single one no run is wanted.
    """

    def __init__(
        self,
        start: float,
        cells: Callable[[float], list[Cell]],
        least: float = 0.0,
        grid: Sequence[float] = (),
    ) -> None:
        self.found, self._cells, self._least, self._grid = start, cells, least, grid
        if len(grid) == 1:
            (self.found,) = grid

    def wanted(self, store: Store) -> list[Cell]:
        """Runs that the next move needs, after all moves that are possible; none at the end."""
        while len(self._grid) != 1:
            neighbours = (self.found, self.found / 2, self.found * 2)
            values = self._grid or [value for value in neighbours if value >= self._least]
            cells = {value: self._cells(value) for value in values}
            missing = [cell for group in cells.values() for cell in group if cell not in store]
            if missing:
                return missing
            found = max(values, key=lambda value: (accuracy(store, cells[value]), -value))
            if found == self.found:
                break
            self.found = found
        return []

    @property
    def bracketed(self) -> bool:
        """Whether a smaller and a larger value were tried, or none was to be chosen."""
        if self._grid:
            return len(self._grid) == 1 or min(self._grid) < self.found < max(self._grid)
        return self.found / 2 >= self._least


def accuracy(store: Store, cells: Iterable[Cell]) -> float:
    """Mean validation accuracy."""
    return fmean(store[cell].validation_accuracy for cell in cells)


def carried_out(searches: list[Search], store: Store, fill: Callable[[list[Cell]], None]) -> None:
    """Carry all of them to their ends, side by side."""
    while wanted := [cell for search in searches for cell in search.wanted(store)]:
        fill(wanted)
