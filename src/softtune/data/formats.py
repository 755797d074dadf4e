"""Parses files of several formats into columns. Nothing is dropped or guessed: cells of tables stay strings ("NA" is a
text), and only blank lines are skipped.

| extension | content |
| --- | --- |
| ``.csv`` | commas, quotes as in RFC 4180, a header |
| ``.tsv`` | tabs, quotes are text, a header |
| ``.jsonl`` | one object per line; a key that a row lacks is null |
| ``.json`` | the same; or one list of rows; or lists of rows by split |
| ``.conll`` | a word and its tag per line, a blank line after a sentence: columns ``tokens`` and ``tags`` |
| any other | only with column names: cells separated by a space, the last cell up to the end of the line |

Messages count rows from 1, without the header.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from softtune.errors import DataError

Columns = dict[str, list[Any]]
Names = Sequence[str] | None

SELF_NAMED = (".jsonl", ".conll")
"""Extensions of formats that include column names."""
WHOLE = "train"
"""Name of the only split of a file without splits."""

_LONGEST_CELL = 2**31 - 1  # the largest C long on every platform


def parse(content: bytes, ending: str, *, split: str = WHOLE, names: Names = None) -> Columns:
    """Parse a file into columns.

    Args:
        content: UTF-8, with or without a byte-order mark.
        ending: the file's extension, such as ``.csv``.
        split: the split to read, where a file has several.
        names: names of the columns, for a file whose rows are cells without a header.

    Raises:
        DataError: the content is malformed or empty, its format is unknown, it has no such split, or it has names for
            its columns and others are given.
    """
    ending = ending.lower()
    if ending not in FORMATS and names is None:
        raise DataError(f"not a {', '.join(FORMATS)} file; convert it, or name its columns")
    if split != WHOLE and ending != ".json":
        raise DataError(f"a file has no split {split!r}; name the file of that split, or use {WHOLE!r}")
    if names is not None and ending in SELF_NAMED:
        raise DataError(f"a {ending} file names its columns itself; leave their names out")
    text = _decoded(content)
    columns = _json(text, split, names) if ending == ".json" else FORMATS.get(ending, _lines_of_cells)(text, names)
    if not any(columns.values()):
        raise DataError("no rows; check that this is the right file")
    return columns


def quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _csv(text: str, names: Names) -> Columns:
    return _columns(csv.reader(io.StringIO(text, newline=""), strict=True), names)


def _tsv(text: str, names: Names) -> Columns:
    return _columns(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE), names)


def _lines_of_cells(text: str, names: Names) -> Columns:
    assert names is not None
    return _columns((line.split(" ", len(names) - 1) for line in _lines(text)), names)


def _columns(reader: Iterator[list[str]], names: Names) -> Columns:
    """Transpose rows of cells into columns, named by ``names`` or else by the first row.

    Raises:
        DataError: a row is malformed or has another number of cells than the header, or two columns have one name.
    """
    table: list[list[str]] = [] if names is None else [list(names)]  # its length is the number of the row to come
    try:
        with _cells_of_any_length():
            for cells in filter(None, reader):
                if names is not None and len(table) == 1 and cells == table[0]:  # a header in spite of given names
                    continue
                if table and len(cells) != len(table[0]):
                    raise DataError(
                        f"row {len(table)} has {len(cells)} cells and the header {len(table[0])}; "
                        "fix this row, or quote the cell that holds a separator"
                    )
                table.append(cells)
    except csv.Error as error:
        raise DataError(f"row {len(table)} is malformed ({error}); check its quotes") from error
    twice = [name for name, count in Counter(table[0] if table else ()).items() if count > 1]
    if twice:
        raise DataError(f"the header has {quoted(twice)} more than once; rename one of them")
    return {name: list(cells) for name, *cells in zip(*table, strict=True)}


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the csv module's process-wide limit of 128 KiB per cell for the length of the block."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _lines(text: str) -> list[str]:
    """The non-blank lines. Not by ``splitlines``, which also splits at U+2028 and other separators within texts."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _jsonl(text: str, names: Names = None) -> Columns:
    return _of_objects(_object(line, row) for row, line in enumerate(_lines(text), start=1))


def _object(line: str, row: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"row {row} is malformed ({error}); write one JSON object a line") from error
    return _checked(record, row)


def _checked(record: Any, row: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"row {row} is a JSON {type(record).__name__}, not an object; write objects, or name columns")
    return record


def _of_objects(records: Iterable[dict[str, Any]]) -> Columns:
    rows = list(records)
    names = dict.fromkeys(name for record in rows for name in record)
    return {name: [record.get(name) for record in rows] for name in names}


def _json(text: str, split: str, names: Names) -> Columns:
    """Parse a list of rows, alone or by split, or else one object per line.

    Raises:
        DataError: there is no such split, or a row is malformed.
    """
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = None  # several lines, or a malformed one, which _jsonl reports with its number
    if isinstance(rows, dict) and rows and all(map(_is_list_of_rows, rows.values())):
        if split not in rows:
            raise DataError(f"the file has no split {split!r}; use one of {quoted(rows)}")
        rows = rows[split]
    elif split != WHOLE:
        raise DataError(f"the file has no splits; use {WHOLE!r} instead of {split!r}")
    if not isinstance(rows, list):
        return _jsonl(text)
    if names is None:
        return _of_objects(_checked(record, row) for row, record in enumerate(rows, start=1))
    return _columns(iter(rows), names)


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, (list, dict)) for row in value)


def _conll(text: str, names: Names = None) -> Columns:
    """Parse the first and the last cell of each line, the word and the tag; those between are ignored."""
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            sentences[-1].append(_tagged(line.removesuffix("\r"), number))
        elif sentences[-1]:
            sentences.append([])
    whole = [list(zip(*sentence, strict=True)) for sentence in sentences if sentence]
    return {"tokens": [list(words) for words, _ in whole], "tags": [list(tags) for _, tags in whole]}


def _tagged(line: str, number: int) -> tuple[str, str]:
    cells = line.split("\t" if "\t" in line else " ")
    if len(cells) < 2 or not cells[-1].strip():
        raise DataError(f"line {number} has no word and tag ({line!r}); separate them by a tab")
    return cells[0], cells[-1]


FORMATS: dict[str, Callable[[str, Names], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".conll": _conll,
}
