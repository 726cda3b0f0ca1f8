"""Saved results as one page of HTML that needs no network."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import pairwise
from typing import Any, TypeGuard, cast

import plotly.graph_objects as go  # type: ignore[import-untyped]
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

import nusam
from nusam.experiments.pages.looks import LOOKS
from nusam.experiments.pages.result import STUDY, Curve, Result, as_certain, rounded
from nusam.experiments.training.methods import METHODS

__all__ = ["page"]

SCALES = ("smoke", "cpu", "desk", "full")
WIDTH = 2  # of a line, in pixels
FEW_POINTS = 25  # up to here each gets a marker
GREY = "#777777"  # in place of black, which a dark page would swallow
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star")


def page(results: Sequence[Result]) -> str:
    """The whole page, plotly.js included."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("nusam.experiments.pages").joinpath("report.html.jinja").read_text("utf-8")
    sections = [Section(result) for result in sorted(results, key=_in_reading_order)]
    present = {result.scale for result in results}
    return environment.from_string(template).render(
        sections=sections,
        scales=[scale for scale in SCALES if scale in present] + sorted(present - set(SCALES)),
        plotly=Markup(get_plotlyjs()),
        # Plotly's own JSON writes NaN as null and leaves no "<" that could end the script element.
        figures=[Markup(plot.figure.to_json()) for section in sections for plot in section.plots],
        version=nusam.__version__,
    )


class Section:
    """A result as the template shows it."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.anchor = re.sub(r"\W+", "-", result.file_name.removesuffix(".json"))
        looks = _looks(result.curves)
        self.plots = [Plot(panel, curves, looks) for panel, curves in result.panels.items()]
        self.numeric = {name: _is_numeric([row.get(name) for row in result.rows]) for name in result.columns}
        self.rows = [_cells(row, result.columns) for row in result.rows]
        self.findings = _rendered(as_certain(result.findings))
        self.circumstances = {str(name): _shown(value) for name, value in result.circumstances.items()}


class Plot:
    """A panel: the curves that share axes."""

    def __init__(self, title: str, curves: Sequence[Curve], looks: dict[str, "Look"]) -> None:
        self.title = title
        self.labels = list(dict.fromkeys(curve.label for curve in curves))
        self.x_title, self.y_title = curves[0].x_title, curves[0].y_title
        self.figure = go.Figure(layout=_layout(curves))
        floor = _floor(curves)
        for curve in curves:
            if curve.error is not None:
                self.figure.add_trace(_band(curve, looks[curve.label], floor))
        named: set[str] = set()
        for curve in curves:
            self.figure.add_trace(_line(curve, looks[curve.label], legend=curve.label not in named))
            named.add(curve.label)

    @property
    def description(self) -> str:
        """What it shows, for those who don't see it."""
        return f"Plot of {self.y_title} over {self.x_title}; lines: {', '.join(self.labels)}."


@dataclass(frozen=True)
class Look:
    """How a line is told from the others, with and without colour."""

    colour: str
    dash: str
    symbol: str


def _in_reading_order(result: Result) -> tuple[bool, list[tuple[int, str]], int, str]:
    """The study before all others, table 2 before table 10, and what ran at full scale first."""
    parts = [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", result.name)]
    return result.name != STUDY, parts, -SCALES.index(result.scale) if result.scale in SCALES else 0, result.data


def _looks(curves: Sequence[Curve]) -> dict[str, Look]:
    """One for each label: a method's own where the label is a method's title, else one that is still free."""
    own = {METHODS[name].title: index for index, name in enumerate(LOOKS)}
    labels = list(dict.fromkeys(curve.label for curve in curves))
    taken = {own[label] for label in labels if label in own}
    free = iter([index for index in range(len(LOOKS) + len(labels)) if index not in taken])
    return {label: _look(own[label] if label in own else next(free)) for label in labels}


def _look(index: int) -> Look:
    """Colours recur after seven, then with another's dashes and symbol."""
    count = len(LOOKS)
    looks = cast(list[tuple[str, str | tuple[int, tuple[float, ...]]]], list(LOOKS.values()))
    colour, dashes = looks[index % count][0], looks[(index + index // count) % count][1]
    dash = dashes if isinstance(dashes, str) else ",".join(f"{WIDTH * part:g}px" for part in dashes[1])
    symbol = SYMBOLS[(index + index // count) % len(SYMBOLS)]
    return Look(GREY if colour == "#000000" else colour, dash, symbol)


def _line(curve: Curve, look: Look, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=curve.x,
        y=curve.y,
        name=escape(curve.label),  # Plotly reads markup in names and titles
        legendgroup=curve.label,
        showlegend=legend,
        mode="lines+markers" if len(curve.x) <= FEW_POINTS else "lines",
        line={"color": look.colour, "dash": look.dash, "width": WIDTH},
        marker={"symbol": look.symbol, "size": 7},
    )


def _band(curve: Curve, look: Look, floor: float) -> go.Scatter:
    """A polygon for each stretch without gaps; a thin outline keeps a lone point's band visible."""
    x: list[float | None] = []
    y: list[float | None] = []
    for stretch in _stretches(curve):
        forth = [(at, value + half) for at, value, half in stretch]
        back = [(at, max(value - half, floor)) for at, value, half in reversed(stretch)]
        for at, edge in (*forth, *back, forth[0]):
            x.append(at)
            y.append(edge)
        x.append(None)
        y.append(None)
    return go.Scatter(
        x=x,
        y=y,
        name=escape(curve.label),
        legendgroup=curve.label,
        showlegend=False,
        hoverinfo="skip",
        mode="lines",
        line={"width": 1, "color": look.colour},
        fill="toself",
        fillcolor=look.colour,
        opacity=0.2,
    )


def _stretches(curve: Curve) -> Iterator[list[tuple[float, float, float]]]:
    """Runs of points that have both a value and an error."""
    stretch: list[tuple[float, float, float]] = []
    for at, value, half in zip(curve.x, curve.y, curve.error or [], strict=True):
        if _is_number(value) and _is_number(half):
            stretch.append((at, value, half))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _floor(curves: Sequence[Curve]) -> float:
    """The least that a band may reach: on a log axis one that reaches zero would have no end."""
    if not any(curve.log_y for curve in curves):
        return -math.inf
    edges = [value for curve in curves for value in curve.y if _is_number(value)]
    bands = (stretch for curve in curves if curve.error for stretch in _stretches(curve))
    edges += [value - half for stretch in bands for _, value, half in stretch]
    return min((edge for edge in edges if edge > 0), default=1.0) / 2


def _layout(curves: Sequence[Curve]) -> dict[str, Any]:
    """Without colours of text and grid: the page's style sheet sets them, as they differ by night and in print."""
    axis = {"automargin": True, "zeroline": False, "ticks": "outside", "exponentformat": "power"}
    log_x, log_y = any(curve.log_x for curve in curves), any(curve.log_y for curve in curves)
    return {
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {**axis, "title": {"text": escape(curves[0].x_title)}, "type": "log" if log_x else "linear"},
        "yaxis": {**axis, "title": {"text": escape(curves[0].y_title)}, "type": "log" if log_y else "linear"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "showlegend": True,
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": "#1a1a1a"}},
    }


def _rendered(markdown: str) -> Markup:
    """As HTML, below the page's own headings. Raw HTML stays text, and an image, which might be loaded, a link."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"
    html = parser.renderer.render(tokens, parser.options, {})  # where "<table>" can only be the renderer's own
    box = '<div class="box" role="region" tabindex="0" aria-label="Table of the findings">'
    return Markup(html.replace("<table>", f"{box}<table>").replace("</table>", "</table></div>"))


def _cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """As they are shown; a number whose standard error stands in the next column, to two digits of that."""
    shown = [_shown(row.get(name)) for name in columns]
    for index, (name, following) in enumerate(pairwise(columns)):
        value, error = row.get(name), row.get(following)
        if following.endswith("s.e.") and _is_number(value) and _is_number(error) and error > 0:
            places = max(6, 2 - math.floor(math.log10(error)))
            shown[index : index + 2] = as_certain(f"{value:.{places}f} ± {error:.{places}f}").split(" ± ")
    return shown


def _shown(value: Any) -> str:
    match value:
        case None | "":
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return rounded(value) if math.isfinite(value) else "–"
        case dict():
            return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
        case list():
            return ", ".join(map(_shown, value))
        case _:
            return as_certain(str(value))


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether a column is to be set flush right: numbers, or text such as "81.2 ± 0.3"."""
    given = [value for value in values if value is not None and value != ""]
    return bool(given) and all(re.match(r"[-+−±]?\.?\d", str(value)) or isinstance(value, float) for value in given)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
