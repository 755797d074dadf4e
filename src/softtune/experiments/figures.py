"""Chooses the figures of a comparison and of a sweep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from softtune.experiments.outcomes import Entry, said
from softtune.experiments.pictures import Bar, Picture, Point, bars, curves, heat, scatter
from softtune.formatting import in_words
from softtune.tasks.metrics import direction

FEWEST = 3
"""Least number of values on an axis for a curve."""


def comparison_figures(entries: Sequence[Entry]) -> list[Picture]:
    """Figures of quality, of quality against trained parameters, of time and of memory."""
    found = finished(entries)
    if not found:
        return []
    metric = found[0].metrics[0]
    name = _measure(metric)
    trained = [entry for entry in found if entry.cost("steps")]
    drawn = [_bars(found, metric)]
    if trained:
        points = {e.name: (e.cost("trained") / e.cost("total"), e.mean(metric)) for e in trained}
        seconds = [Bar(entry.name, entry.cost("seconds")) for entry in trained]
        memory = [Bar(entry.name, entry.cost("memory") / 1e9) for entry in trained]
        drawn += [
            scatter("Quality against what is trained", points, across="share of the parameters", up=name),
            bars("Time", seconds, unit="seconds of training, one seed"),
            bars("Memory", memory, unit="GB at most while training, with the base model"),
        ]
    return drawn


def sweep_figures(entries: Sequence[Entry], metric: str | None, *, searched: bool) -> list[Picture]:
    """Figures of quality over the axes: curves along a numeric axis, else a heat map of two axes, else bars. For a
    search, the tried values of each numeric axis.

    Args:
        entries: the points of the sweep.
        metric: the metric to show; by default the first.
        searched: whether the points come from a search instead of a grid.
    """
    found = finished(entries)
    if not found:
        return []
    metric = metric or found[0].metrics[0]
    names = dict.fromkeys(name for entry in found for name in entry.at)
    axes = {name: list(dict.fromkeys(_key(entry.at.get(name)) for entry in found)) for name in names}
    numbers = {name: keys for name, keys in axes.items() if all(_is_number(key) for key in keys)}
    if searched:
        return [_tried(found, metric, name) for name in numbers] or [_bars(found, metric)]
    along = max(numbers, key=lambda name: len(numbers[name]), default=None)
    if along and len(numbers[along]) >= FEWEST:
        return [_curves(found, metric, along)]
    varied = [name for name, keys in axes.items() if len(keys) > 1]
    is_map = len(varied) == 2 and all(name in entry.at for name in varied for entry in found)
    return [_map(found, metric, *varied)] if is_map else [_bars(found, metric)]


def finished(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that have results."""
    return [entry for entry in entries if entry.outcomes]


def _bars(found: Sequence[Entry], metric: str) -> Picture:
    entry_bars = [Bar(entry.name, entry.mean(metric), entry.spread(metric), entry.values(metric)) for entry in found]
    return bars(f"Quality: {in_words(metric)}", entry_bars, unit=f"{_measure(metric)}, dots are seeds")


def _curves(found: Sequence[Entry], metric: str, along: str) -> Picture:
    """Curves along one axis, one line for each combination of the other axes' values."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for entry in found:
        others = [said(in_words(name), value) for name, value in entry.at.items() if name != along]
        lines[", ".join(others) or "alone"].append(Point(entry.at[along], entry.mean(metric), entry.spread(metric)))
    return curves(_over(metric, along), lines, across=in_words(along), up=_measure(metric))


def _tried(found: Sequence[Entry], metric: str, along: str) -> Picture:
    points = [Point(entry.at[along], entry.mean(metric), entry.spread(metric)) for entry in found]
    return curves(_over(metric, along), {"": points}, across=in_words(along), up=_measure(metric), joined=False)


def _map(found: Sequence[Entry], metric: str, down: str, across: str) -> Picture:
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in found:
        cells[str(_key(entry.at[down]))][str(_key(entry.at[across]))] = entry.mean(metric)
    title = f"{in_words(metric).capitalize()} by {in_words(down)} and {in_words(across)}"
    says = "" if direction(metric) > 0 else "Less is better."
    return heat(title, filled(cells), across=in_words(across), down=in_words(down), says=says)


def filled(cells: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """A table whose missing cells are NaN."""
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    return {name: {column: row.get(column, math.nan) for column in columns} for name, row in cells.items()}


def _measure(metric: str) -> str:
    """A metric's name as an axis label."""
    return in_words(metric) + ("" if direction(metric) > 0 else ", less is better")


def _over(metric: str, along: str) -> str:
    return f"{in_words(metric).capitalize()} over {in_words(along)}"


def _key(value: Any) -> Any:
    """A point's value on an axis: a number as it is, anything else as a string."""
    return value if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
