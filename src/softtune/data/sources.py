"""Where records come from: CSV, TSV and JSON-lines files, or a data set on the Hugging Face hub; and how to sample.

A record is one row: column name -> value. Nothing is dropped and nothing guessed: the cells of CSV and TSV files stay
strings ("NA" is a word), only blank lines are passed over. Messages count rows from 1, without the header.

Knows nothing of templates, tokens or labels' meaning. ``datasets`` is imported on first use, for it is slow to import.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from softtune import storage
from softtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Result = TypeVar("Result")
_LONGEST_CELL = 2**31 - 1  # the most that every platform's C long holds


def load_records(source: str, *, split: str = "train") -> Dataset:
    """Load records from a file or from the hub.

    ``source`` is a file if a path of this name exists or could be nothing else: ``.csv`` (commas, quotes as in RFC
    4180), ``.tsv`` (tabs, quotes are text), ``.jsonl`` or ``.json`` (one object a line; a key that a row lacks is
    null). Files are UTF-8, with or without a byte-order mark. Anything else goes to
    ``datasets.load_dataset(source, split=split)``. A file is one split, ``"train"``.

    Raises:
        DataError: the file is missing, empty, malformed or of another kind, or the hub has no such data set or split.
    """
    path = Path(source).expanduser()
    if storage.is_path(source) or re.fullmatch(r"\.[A-Za-z]+", path.suffix):
        return _load_file(path, split)
    return _load_from_hub(source, split)


def split_records(dataset: Dataset, *, test_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Shuffle and split into (train, test); ``test_size`` is a number of rows (int) or a share of them (float).

    Raises:
        DataError: one of the two would have no rows.
    """
    try:
        parts = dataset.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise DataError(f"cannot split {len(dataset)} rows: {_first_line(error)}") from error
    return parts["train"], parts["test"]


def sample_balanced(dataset: Dataset, *, column: str, size: int, seed: int, shares: Mapping[str, float]) -> Dataset:
    """Draw ``size`` rows in random order, of every value of ``column`` its share.

    Shares sum to 1; a value that they do not name gets no rows. Rows that do not divide evenly go to the largest
    remainders, and among equals to the value that comes first in ``shares``.

    Raises:
        DataError: there is no such column, the shares do not sum to 1, or a value has too few rows.
    """
    check_columns([column], dataset.column_names)
    values = [str(value) for value in dataset[column]]
    counts = Counter(values)
    quotas = _quotas(shares, size)
    if any(quota > counts[value] for value, quota in quotas.items()):
        rows = ", ".join(f"{value!r}: {quota} wanted, {counts[value]} there" for value, quota in quotas.items())
        raise DataError(f"too few rows to sample by {column!r} ({rows}); lower the size or change the shares")
    drawn = []
    for index in random.Random(seed).sample(range(len(values)), len(values)):
        if quotas.get(values[index], 0):
            quotas[values[index]] -= 1
            drawn.append(index)
    return dataset.select(drawn)


def each_row(
    records: Dataset, columns: Collection[str], function: Callable[[Mapping[str, Any]], Result]
) -> list[Result]:
    """What ``function`` makes of every record, which must have these columns. A DataError names its row, from 1."""
    check_columns(columns, records.column_names)
    results = []
    for row, record in enumerate(records, start=1):
        try:
            results.append(function(record))
        except DataError as error:
            raise DataError(f"row {row}: {error}") from error
    return results


def fingerprint(records: Dataset, columns: Iterable[str]) -> str:
    """A hash of these columns, row by row."""
    digest = hashlib.sha256()
    for record in records.select_columns(list(dict.fromkeys(columns))):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def check_columns(wanted: Iterable[str], columns: Collection[str]) -> None:
    """Raise ``DataError`` when one of the ``wanted`` columns is missing, with the closest name there is."""
    missing = [name for name in wanted if name not in columns]
    if not missing:
        return
    close = [match for name in missing for match in difflib.get_close_matches(name, columns, n=1)]
    hint = f"did you mean {_quoted(close)}?" if close else "name one of these"
    raise DataError(f"no column {_quoted(missing)} in the data, which has {_quoted(columns)}; {hint}")


def _quotas(shares: Mapping[str, float], size: int) -> dict[str, int]:
    if size < 1:
        raise DataError(f"a sample of {size} rows is empty; ask for 1 or more")
    total = sum(shares.values())
    if min(shares.values(), default=0) < 0 or abs(total - 1) > 1e-6:
        raise DataError(f"shares {dict(shares)} must be 0 or more and sum to 1; change them")
    exact = {value: share / total * size for value, share in shares.items()}
    quotas = {value: int(rows) for value, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda value: quotas[value] - exact[value])
    for value in by_remainder[: size - sum(quotas.values())]:
        quotas[value] += 1
    return quotas


def _load_from_hub(name: str, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # network, hub, builder and parser all raise types of their own
        cause = _first_line(error)
        raise DataError(
            f"cannot load {name!r} (split {split!r}) from the hub: {cause}; check name, split and network"
        ) from error


def _load_file(path: Path, split: str) -> Dataset:
    import datasets
    import pyarrow as pa

    if not path.exists():
        raise DataError(f"there is no file {path}; check the path")
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise DataError(f"{path} is not a {', '.join(_PARSERS)} file; convert it, or name such a file")
    if split != "train":
        raise DataError(f"{path} is a file and has no split {split!r}; name the file of that split, or use 'train'")
    try:
        columns = parse(_read_text(path))
        if not any(columns.values()):
            raise DataError("no rows; check that this is the right file")
        return datasets.Dataset.from_dict(columns)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise DataError(f"{path}: {_first_line(error)}; give every column values of one type") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the file ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _parse_csv(text: str) -> dict[str, list[Any]]:
    return _columns_of_table(csv.reader(io.StringIO(text, newline=""), strict=True))


def _parse_tsv(text: str) -> dict[str, list[Any]]:
    return _columns_of_table(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def _columns_of_table(reader: Iterator[list[str]]) -> dict[str, list[Any]]:
    table: list[list[str]] = []  # the header, then the rows: its length is the number of the row to come
    try:
        with _cells_of_any_length():
            for cells in filter(None, reader):
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
        raise DataError(f"the header has {_quoted(twice)} more than once; rename one of them")
    return {name: list(cells) for name, *cells in zip(*table, strict=True)}


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a cell, which is a setting of the whole process, for a while."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parse_jsonl(text: str) -> dict[str, list[Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and other separators that it splits at.
    lines = [line for line in text.split("\n") if line.strip()]
    records = [_parse_object(line, row) for row, line in enumerate(lines, start=1)]
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _parse_object(line: str, row: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"row {row} is malformed ({error}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"row {row} is a JSON {type(record).__name__}, not an object; write one object a line")
    return record


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


_PARSERS: dict[str, Callable[[str], dict[str, list[Any]]]] = {
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
    ".jsonl": _parse_jsonl,
    ".json": _parse_jsonl,
}
