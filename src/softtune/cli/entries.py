"""The tables that commands print of an experiment's entries, and their exit code where some failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.table import Table

from softtune.cli import FAILED
from softtune.cli.console import console
from softtune.experiments.outcomes import Entry
from softtune.experiments.page import Table as Cells
from softtune.experiments.report import failures, tables_of


def show_entries(entries: Sequence[Entry], metric: str | None = None) -> None:
    """Print the tables and the failures of an experiment."""
    for found in tables_of(entries, metric):
        for columns in _fitting(found, console.width):
            table = Table(*(found.head[i] for i in columns))
            table.columns[0].max_width = console.width // 3
            for column in table.columns[1:]:
                column.justify = "right"
            for line in found.lines:
                table.add_row(*(line[i] for i in columns))
            console.print(table)
    for failure in failures(entries):
        console.print(failure)


def exit_on_failures(entries: Sequence[Entry]) -> None:
    """Exit with one line on stderr and code 1 if entries failed; those that do not fit are no failures."""
    failed = [entry for entry in entries if entry.failure and not entry.is_left_out]
    if failed:
        may_pass = any(not entry.is_final for entry in failed)
        remedy = "and run the same command again" if may_pass else "which would end so again, and name another output"
        count = f"{len(failed)} of {len(entries)}"
        print(f"softtune: {count} failed: mend what is told above, {remedy}", file=sys.stderr)
        sys.exit(FAILED)


def _fitting(table: Cells, width: int) -> Iterator[list[int]]:
    """Split a table's columns into groups that fit the console's width, each with the column of names first."""
    names, *sizes = (3 + max(map(len, column)) for column in zip(table.head, *table.lines, strict=True))
    room = width - 1 - min(names, width // 3 + 3)
    columns, used = [0], 0
    for number, size in enumerate(sizes, start=1):
        if used + size > room and len(columns) > 1:
            yield columns
            columns, used = [0], 0
        columns.append(number)
        used += size
    yield columns
