"""Reads columns of records. A record is one row: column name -> value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from softtune.data.formats import quoted
from softtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Result = TypeVar("Result")


def each_row(
    records: Dataset, columns: Collection[str], function: Callable[[Mapping[str, Any]], Result]
) -> list[Result]:
    """Apply ``function`` to every record, which must have these columns.

    Raises:
        DataError: a column is missing, or ``function`` raised it; then the message names the row, from 1.
    """
    check_columns(columns, records.column_names)
    results = []
    for row, record in enumerate(records, start=1):
        try:
            results.append(function(record))
        except DataError as error:
            raise error.at(f"row {row}") from error
    return results


def check_columns(wanted: Iterable[str], columns: Collection[str]) -> None:
    """Check that the data has all ``wanted`` columns.

    Raises:
        DataError: a column is missing; the message suggests the closest name.
    """
    missing = [name for name in dict.fromkeys(wanted) if name not in columns]
    if not missing:
        return
    close = [match for name in missing for match in difflib.get_close_matches(name, columns, n=1)]
    hint = f"did you mean {quoted(close)}?" if close else "name one of these"
    raise DataError(f"no column {quoted(missing)} in the data, which has {quoted(columns)}; {hint}")


def text_of(record: Mapping[str, Any], column: str) -> str:
    """A column's text, which may not be empty.

    Raises:
        DataError: it is empty, null, an object, or a list of them.
    """
    text = cell_text(record, column)
    if not text:
        raise DataError(f"column {column!r} is empty and so there is no answer; fill it in or drop the row")
    return text


def cell_text(record: Mapping[str, Any], column: str) -> str:
    """A column's text, which may be empty.

    Texts of a list are joined by spaces. Lists in a list, such as triples, are formatted as
    ``a | b | c && d | e | f``.

    Raises:
        DataError: it is null, an object, or a list of them.
    """
    value = record[column]
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return " && ".join(" | ".join(_scalar(cell, column) for cell in item) for item in value)
    return " ".join(_scalar(item, column) for item in value) if isinstance(value, list) else _scalar(value, column)


def _scalar(value: Any, column: str) -> str:
    if not isinstance(value, (str, int, float)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"column {column!r} holds {kind}; make it text or drop the row")
    return str(value)
