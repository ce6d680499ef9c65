"""Charts, drawn by matplotlib: as SVG that takes its colours from the page, and as PNG files."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ssmtrain.config.errors import UserError

COLOURS = ("#2563c9", "#d1570a", "#1b8a4b", "#b3267c", "#6d4fc2", "#8a6d00", "#0f8c95", "#b3372f")
"""Of the series, in order; the page's --c0 to --c7, which are lighter on a dark screen."""
SIZE = (5.2, 3.3)
"""Inches; at 72 points an inch the SVG is hardly scaled on a phone."""

_INK = "#010203"
"""Stands for the page's colour of text."""
_ID = re.compile(r'(?:(?<=\sid=")|(?<=href="#)|(?<=url\(#))')
_KEPT = re.compile(r"<svg\b.*</svg>", re.DOTALL)
_GROUP_ID = re.compile(r'<g id="[^"]*">')

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) in order."""

    name: str
    points: list[Point]
    colour: int = 0
    """Index in COLOURS, beyond the last from the first again with dashes."""
    dots: bool = False
    """Few points, each of them marked."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    key: str
    """Its name in ids and file names: letters, digits and dashes."""
    title: str
    x: str
    y: str
    series: list[Series]
    log_y: bool = False
    marks: dict[str, float] = field(default_factory=dict)
    """Horizontal lines by name."""


def figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty figure of so many inches, parts making room for each other; UserError without matplotlib."""
    try:
        # The object interface: pyplot would pick a backend for a screen and keep the figure alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"no pictures without matplotlib ({error})", "pip install matplotlib") from None
    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(made)
    return made


def svg(chart: Chart) -> str:
    """The chart as an <svg> element in the page's colours, its ids its own; titles are the page's affair."""
    drawn = io.StringIO()
    with _settings():
        _draw(chart).savefig(
            drawn,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    found = _KEPT.search(drawn.getvalue())
    assert found is not None
    text = re.sub(r"<metadata>.*?</metadata>", "", found[0], flags=re.DOTALL)
    text = _GROUP_ID.sub("<g>", text)
    text = _ID.sub(f"{chart.key}-", text)
    text = text.replace(_INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{number})")
    text = re.sub(
        r'<svg\b[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1
    )
    return re.sub(r'\sxlink:href="', ' href="', text)


def png(chart: Chart) -> bytes:
    """The chart as a PNG file with its title and names in it."""
    drawn = io.BytesIO()
    with _settings():
        made = _draw(chart, titled=True)
        axes = made.axes[0]
        axes.set_title(chart.title)
        handles = [line for line in axes.get_lines() if line.get_gid() == "series"]
        if len(handles) > 1:
            # matplotlib leaves out what begins with an underscore.
            names = [f" {one.name}" for one in chart.series if one.points]
            axes.legend(handles[:12], names[:12], fontsize=8)
        made.savefig(drawn, format="png", dpi=160)
    return drawn.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    """Text that stays text and is no formula; ids that are the same each time."""
    figure(1, 1)  # says what is missing
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ssmtrain",
        "text.parse_math": False,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "path.simplify": True,
    }
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings |= dict.fromkeys(parts, _INK)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        yield


def _draw(chart: Chart, titled: bool = False) -> Any:
    # Room that is the same in all charts: measuring every text takes as long as drawing it.
    made = figure(*SIZE, layout=None)
    axes = made.add_axes((0.17, 0.155, 0.815, 0.75 if titled else 0.81))
    for one in chart.series:
        if not one.points:
            continue
        style: dict[str, Any] = {"lw": 1.3, "color": COLOURS[one.colour % len(COLOURS)], "gid": "series"}
        if one.colour >= len(COLOURS):
            style["ls"] = "--"
        if one.dots or len(one.points) == 1:
            style |= {"marker": "o", "ms": 4}
        axes.plot(*zip(*one.points, strict=True), **style)
    for name, value in chart.marks.items():
        axes.axhline(value, lw=0.8, ls=":", color=_INK)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
        axes.annotate(name, (1.0, value), **where)
    positive = [y for one in chart.series for _, y in one.points if y > 0]
    if chart.log_y and positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    elif not chart.marks:
        _loosen(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(short)
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(lambda value, position: "")
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(alpha=0.15)
    return made


def _loosen(axes: Any) -> None:
    """A line that is flat up to rounding shall look flat."""
    low, high = axes.get_ylim()
    if math.isfinite(low) and high - low < 1e-6 * max(abs(low), abs(high), 1e-12):
        axes.set_ylim(low - 0.5 * abs(low) - 1e-12, high + 0.5 * abs(high) + 1e-12)


def short(value: float, position: int | None = None) -> str:
    """A tick: 0, 500, 20k, 1.5M; powers of ten beyond T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
