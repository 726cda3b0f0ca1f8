"""Which methods, engines and options meet in a run: not all in one another's company, but every two of them."""

from itertools import combinations, product
from typing import NamedTuple

from tests.distributed.engines import ENGINES

METHODS = ("NuSAM", "NuSAMNorm", "SAM")
PATHS = (("gradient", "weights"), ("matrix-free", "forward"), ("gradient", "forward"), ("matrix-free", "weights"))
LOOPS = (("SGD", False), ("AdamW", True), ("AdamW", False), ("SGD", True))  # base optimizer, accumulation


class Cell(NamedTuple):
    """One run, which must come out as in a single process."""

    engine: str
    method: str
    ascent: str
    placement: str
    base: str
    accumulate: bool


def cells(processes: int) -> list[Cell]:
    """Under every engine each method: on every path in two processes, on two of them in four."""
    found = []
    for number, engine in enumerate(name for name, (sizes, _) in ENGINES.items() if processes in sizes):
        ways = [(method, path) for method in METHODS for path in (PATHS[:1] if method == "SAM" else PATHS)]
        if processes == 4:  # on two cores they are slow; the other two paths are the next engine's
            ways = [way for i, way in enumerate(ways) if way[0] == "SAM" or (i // 2 + i // 4 + number) % 2 == 0]
        for i, (method, path) in enumerate(ways):
            found.append(Cell(engine, method, *path, *LOOPS[(i + i // 4 + number) % 4]))
    return found


def uncovered(processes: int) -> list[tuple[object, object]]:
    """Pairs of choices that can meet, and do in no cell."""
    every = [
        Cell(engine, method, *path, *loop)
        for engine, (sizes, _) in ENGINES.items()
        for method, path, loop in product(METHODS, PATHS, LOOPS)
        if processes in sizes and (method != "SAM" or path == PATHS[0])
    ]

    def pairs(of: list[Cell]) -> set[tuple[object, object]]:
        return {pair for cell in of for pair in combinations(zip(Cell._fields, cell, strict=True), 2)}

    return sorted(pairs(every) - pairs(cells(processes)), key=str)
