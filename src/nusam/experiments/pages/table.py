"""A result for a terminal."""

from itertools import pairwise

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from nusam.experiments.pages.result import Result

__all__ = ["show"]


def show(result: Result, console: Console) -> None:
    """Print table, findings and notes; a line between models."""
    where = ", ".join(filter(None, (result.scale, result.data)))
    title = f"{result.title} ({where})" if result.scale else result.title
    table = Table(title=title, box=HORIZONTALS, collapse_padding=True, pad_edge=False)
    for column in result.columns:
        table.add_column(column, no_wrap=column == "method")
    for above, row in pairwise([result.rows[0] if result.rows else {}, *result.rows]):
        if above.get("model") != row.get("model"):
            table.add_section()
        table.add_row(*(str(row.get(column, "")) for column in result.columns))
    console.print(table)
    if result.findings:
        console.print(Markdown(result.findings))
    for note in result.notes:
        console.print(f"· {note}", highlight=False)
