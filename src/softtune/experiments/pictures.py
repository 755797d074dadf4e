"""Draws pictures as SVG, legible in print and on dark screens: the background is transparent, and the ink is light in
dark mode.

Knows nothing about runs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

INK, LIGHT_INK = "#4d5761", "#bcc6d0"
ON_DARK = f"""<style>@media screen and (prefers-color-scheme: dark) {{
[style*="fill: {INK}"] {{ fill: {LIGHT_INK} !important }}
[style*="stroke: {INK}"] {{ stroke: {LIGHT_INK} !important }}
}}</style>
"""
COLORS = ("#3b82c4", "#e07b39", "#4c9f70", "#b0589f", "#c9a227", "#6f7fd8", "#c0504d", "#2f9e9e")
MARKS = ("o", "s", "^")
WIDTH = 5.6
"""Width of a picture in inches."""
WIDE = 10
"""An axis is logarithmic where the greatest value is at least this many times the least."""

LONG = 26
"""Characters of the longest name that fits beside the axes."""
MANY = 12
"""Up to this many points, a curve has a mark and a tick for each."""


@dataclass
class Picture:
    """A drawing with its title and caption."""

    title: str
    svg: str
    says: str = ""
    """Caption of a line or two."""


@dataclass(frozen=True)
class Bar:
    """One bar, and the spread of its value to either side."""

    name: str
    value: float
    spread: float = 0.0
    points: Sequence[float] = field(default_factory=tuple)
    """The values of which ``value`` is the mean."""


@dataclass(frozen=True)
class Point:
    """A point of a curve, and the spread of its y value to either side."""

    x: float
    y: float
    spread: float = 0.0


def bars(title: str, data: Sequence[Bar], *, unit: str, says: str = "") -> Picture:
    """Horizontal bars, the first on top, with their values."""
    with _figure(0.5 + 0.36 * len(data)) as (axes, finished):
        places = range(len(data), 0, -1)
        axes.barh(places, [bar.value for bar in data], color=COLORS[0], alpha=0.75, height=0.62)
        most = max((max(bar.value, *bar.points, 0.0) for bar in data), default=1.0) or 1.0
        for place, bar in zip(places, data, strict=True):
            axes.plot(bar.points, [place] * len(bar.points), "o", color=INK, markersize=3.5, zorder=3)
            label = f"{bar.value:.3g}" + (f" ± {bar.spread:.2g}" if bar.spread else "")
            edge = max(bar.value, *bar.points, 0.0)
            axes.text(edge + 0.015 * most, place, label, va="center", color=INK, fontsize=8.5)
        axes.set_yticks(list(places), [fill(bar.name, LONG) for bar in data])
        axes.set_xlim(0, 1.22 * most)
        axes.set_xlabel(unit)
    return Picture(title, finished[0], says)


def scatter(title: str, points: Mapping[str, tuple[float, float]], *, across: str, up: str, says: str = "") -> Picture:
    """Named points on a logarithmic x axis; points at 0 are drawn at its left end."""
    from matplotlib.ticker import LogLocator

    with _figure(3.6 + _below(points)) as (axes, finished):
        positive = [x for x, _ in points.values() if x > 0]
        least = min(positive, default=1.0) / 3
        for number, (name, (x, y)) in enumerate(points.items()):
            style = MARKS[number // len(COLORS) % len(MARKS)]
            axes.plot(max(x, least), y, style, color=COLORS[number % len(COLORS)], markersize=7, alpha=0.85, label=name)
        _be_logarithmic(axes)
        most = max(x for x, _ in points.values())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if most > 100 * least else (1.0, 3.0)))
        axes.margins(x=0.1, y=0.15)
        _legend(axes, points)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return Picture(title, finished[0], says)


def curves(
    title: str, lines: Mapping[str, Sequence[Point]], *, across: str, up: str, says: str = "", joined: bool = True
) -> Picture:
    """Points by line with error bars, joined or not. The x axis is logarithmic for a wide range of positive numbers."""
    with _figure(3.4 + _below(lines)) as (axes, finished):
        for number, (name, points) in enumerate(lines.items()):
            ordered = sorted(points, key=lambda point: point.x)
            x, y, spread = zip(*((point.x, point.y, point.spread) for point in ordered), strict=True)
            style = MARKS[number // len(COLORS) % len(MARKS)] + ("-" if joined else "")
            whiskers = [s or math.nan for s in spread]
            color, size = COLORS[number % len(COLORS)], 5 if len(x) <= MANY else 0
            axes.errorbar(x, y, whiskers, fmt=style, color=color, markersize=size, capsize=2.5, label=name)
        places = sorted({point.x for points in lines.values() for point in points})
        if places[0] > 0 and places[-1] / places[0] >= WIDE:
            _be_logarithmic(axes)
        if joined and len(places) <= MANY:
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
        if len(lines) > 1:
            _legend(axes, lines)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return Picture(title, finished[0], says)


def heat(
    title: str, cells: Mapping[str, Mapping[str, float]], *, across: str, down: str, says: str = "", form: str = ".3g"
) -> Picture:
    """A heat map of numbers by row and column, each written into its cell."""
    rows, columns = list(cells), list(next(iter(cells.values())))
    values = [[cells[row][column] for column in columns] for row in rows]
    with _figure(0.9 + 0.34 * len(rows)) as (axes, finished):
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 8 else 0)
        axes.set_yticks(range(len(rows)), rows)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    ink = "black" if image.norm(value) > 0.6 else "white"
                    axes.text(j, i, f"{value:{form}}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
    return Picture(title, finished[0], says)


def places(
    title: str, groups: Mapping[str, Sequence[tuple[str, float, float]]], *, across: str, up: str, says: str = ""
) -> Picture:
    """Names at their positions in a plane, by group; those of the first group have a dot."""
    with _figure(4.4) as (axes, finished):
        for number, (group, named) in enumerate(groups.items()):
            color, dots = COLORS[number % len(COLORS)], 14 if number == 0 else 0
            axes.scatter([x for _, x, _ in named], [y for _, _, y in named], s=dots, color=color, label=group)
            for name, x, y in named:
                axes.annotate(name, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=7, color=color)
        axes.margins(0.12)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return Picture(title, finished[0], says)


def _be_logarithmic(axes: Any) -> None:
    """Make the x axis logarithmic, with plain numbers."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, names: Iterable[str]) -> None:
    """Draw a legend beside the axes, or below them where a name is long."""
    style: Any = {"frameon": False, "labelcolor": INK, "fontsize": 9}
    if _below(names):
        axes.figure.legend(loc="outside lower left", **style)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), **style)


def _below(names: Iterable[str]) -> float:
    """Height in inches of a legend below the axes; 0 where it fits beside them."""
    sizes = [*map(len, names)]
    return 0.2 * len(sizes) if max(sizes) > LONG else 0.0


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on, and a list that holds the SVG after the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # tokens and names may contain dollar signs
        "svg.hashsalt": "softtune",
        "font.family": "sans-serif",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    finished: list[str] = []
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure.subplots(), finished
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    head, tag, rest = out.getvalue()[out.getvalue().index("<svg") :].partition("<defs>")
    finished.append(head + ON_DARK + tag + rest)
