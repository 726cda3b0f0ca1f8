"""What an experiment of the paper came to, as it is saved, shown and reported: a table, curves and a verdict."""

import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from nusam.experiments.errors import Refused
from nusam.experiments.files import write_whole

__all__ = ["STUDY", "Curve", "Result", "as_certain", "read_all", "rounded"]

STUDY = "study"  # the name of the result that comes first


@dataclass(frozen=True)
class Curve:
    """A line of a figure."""

    panel: str  # which of the figure's plots it belongs to, and that plot's title
    label: str
    x: list[float]
    y: list[float | None]
    x_title: str
    y_title: str
    error: list[float] | None = None  # half the width of its band
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Result:
    """A table or figure, reproduced at some scale.

    Attributes:
        name: as the command names it, such as "table2".
        title: a sentence.
        scale: smoke, cpu, desk or full, or "" where there is none.
        data: the data's title, or "" where there is none.
        columns: of the table, in order; the keys of ``rows``.
        findings: Markdown: what agrees with the paper, what doesn't, what the noise allows one to say.
        notes: what a reader must know, such as the values that the paper's text lacks and are ours.
        circumstances: device, date, versions, command, seconds.
    """

    name: str
    title: str
    scale: str
    data: str
    columns: list[str]
    rows: list[dict[str, Any]]
    curves: list[Curve] = field(default_factory=list)
    findings: str = ""
    notes: list[str] = field(default_factory=list)
    circumstances: dict[str, Any] = field(default_factory=dict)

    @property
    def panels(self) -> dict[str, list[Curve]]:
        """The curves that share axes, by the title of their plot."""
        panels: dict[str, list[Curve]] = {}
        for curve in self.curves:
            panels.setdefault(curve.panel, []).append(curve)
        return panels

    @property
    def file_name(self) -> str:
        """Of the saved result, in a folder of results."""
        data = "".join(c if c.isalnum() else "-" for c in self.data.lower()).strip("-")
        return "-".join(filter(None, (self.name, self.scale, data))) + ".json"

    @property
    def markdown(self) -> str:
        """For a reader without a browser; curves are left to the report."""
        where = ", ".join(filter(None, (self.name, self.scale, self.data)))
        lines = [f"# {self.title} ({where})", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "| --- " * len(self.columns) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(column)) for column in self.columns) + " |" for row in self.rows]
        lines += ["", self.findings, "", *(f"- {note}" for note in self.notes), ""]
        lines += [f"- {name}: {value}" for name, value in self.circumstances.items()]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> Path:
        """Save it, whole or not at all, and beside it as Markdown."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        content = json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n"
        for target, text in ((path.with_suffix(".md"), self.markdown), (path, content)):
            write_whole(target, text)
        return path


def rounded(value: float) -> str:
    """To four digits, or to a whole number where that has more: of numbers that come without an error."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_certain(text: str) -> str:
    """Each "mean ± error" of a text, to two digits of the error, as more of them mean nothing."""
    return _UNCERTAIN.sub(_as_certain, text)


def _as_certain(found: re.Match[str]) -> str:
    mean, error = Decimal(found[2]), Decimal(found[4])
    if not error:
        return found[0]
    places = min(1 - error.adjusted(), -int(error.as_tuple().exponent), -int(mean.as_tuple().exponent))
    unit = Decimal(1).scaleb(-max(places, 0))
    return f"{found[1]}{mean.quantize(unit, ROUND_HALF_UP)}{found[3]}{error.quantize(unit, ROUND_HALF_UP)}"


_UNCERTAIN = re.compile(r"([-+−]?)(\d+\.\d+)( ± )(\d+\.\d+)")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def read_all(folder: Path) -> list[Result]:
    """Every saved result of a folder, by name, the study before all others.

    Raises:
        Refused: if a file is no result.
    """
    results = []
    for path in sorted(folder.glob("*.json"), key=lambda path: (not path.name.startswith(f"{STUDY}-"), path)):
        try:
            result = _made(Result, json.loads(path.read_text("utf-8")), "it")
            if not isinstance(result.curves, list):
                raise ValueError("curves is no list")
            curves = [_made(Curve, curve, "a curve") for curve in result.curves]
            result = replace(result, curves=curves)
            _check(result)
        except OSError as error:
            raise Refused(f"{path} can't be read ({error.strerror}); name another folder.") from error
        except (TypeError, ValueError) as error:
            raise Refused(
                f"{path} is no saved result ({error}); repair or remove it, or name another folder."
            ) from error
        results.append(result)
    return results


def _made(kind: type[Any], content: Any, what: str) -> Any:
    """Of what a file has; a field that is missing or unknown is named."""
    if not isinstance(content, dict):
        raise ValueError(f"{what} is no JSON object")
    known = {field.name: field for field in fields(kind)}
    for name, field_ in known.items():
        if name not in content and field_.default is field_.default_factory is MISSING:
            raise ValueError(f"{what} lacks {name}")
    if unknown := [name for name in content if name not in known]:
        raise ValueError(f"{what} has {unknown[0]}, which is unknown")
    return kind(**content)


def _check(result: Result) -> None:
    """Files may be edited by hand; what a reader would stumble over is said here.

    Raises:
        ValueError: if something is not of its kind.
    """
    kinds: dict[str, type] = dict.fromkeys(("name", "title", "scale", "data", "findings"), str)
    kinds |= dict.fromkeys(("rows", "columns", "notes"), list) | {"circumstances": dict}
    for name, kind in kinds.items():
        if not isinstance(getattr(result, name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(row, dict) for row in result.rows):
        raise ValueError("a row is no dict")
    if not all(isinstance(text, str) for text in result.columns + result.notes):
        raise ValueError("a column or a note is no str")
    for curve in result.curves:
        if not all(isinstance(text, str) for text in (curve.panel, curve.label, curve.x_title, curve.y_title)):
            raise ValueError("a title of a curve is no str")
        for name, values in (("x", curve.x), ("y", curve.y), ("error", [] if curve.error is None else curve.error)):
            if not isinstance(values, list) or not all(isinstance(value, int | float | None) for value in values):
                raise ValueError(f"{name} of the curve {curve.label} is no list of numbers")
        if len({len(values) for values in (curve.x, curve.y, curve.error) if values is not None}) > 1:
            raise ValueError(f"x, y and error of the curve {curve.label} differ in length")
