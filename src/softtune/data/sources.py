"""Loads records from files, see ``formats``, or from a data set on the Hugging Face hub; splits and samples them.

A record is one row: column name -> value. Messages count rows from 1.

Knows nothing of templates, tokens or labels' meaning. ``datasets`` is imported on first use, since its import is slow.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softtune import storage
from softtune.data.formats import WHOLE, parse, quoted
from softtune.data.records import check_columns
from softtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


ARCHIVED = "zip://"
"""Prefix of the name of a file in an archive, as in fsspec."""
KINDS = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
"""JSON's names of types."""
NAMED = 8
"""How many files of an archive the message names if the wanted one is missing."""


def load_records(source: str, *, split: str = WHOLE, columns: Sequence[str] | None = None) -> Dataset:
    """Load records from a file or from the hub.

    Args:
        source: a file of one of the ``formats``, if a path of this name exists or it can only be a path; a file in a
            zip archive, as ``zip://member::archive.zip``; anything else is a data set on the hub.
        split: the split, of a data set on the hub or of a file that has several. Other files have one, ``"train"``.
        columns: names of the columns, for a file without a header.

    Raises:
        DataError: the file is missing, empty, malformed or of another format, or the hub has no such data set or split.
    """
    if columns is None and is_hub_data_set(source):
        return _load_from_hub(source, split)
    return _load_file(source, split, columns)


def is_hub_data_set(source: str) -> bool:
    """Whether a source of records is the name of a data set on the hub, and no file."""
    is_file = source.startswith(ARCHIVED) or storage.is_path(source)
    return not is_file and not re.fullmatch(r"\.[A-Za-z]+", Path(source).suffix)


def split_records(dataset: Dataset, *, test_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Shuffle and split into (train, test); ``test_size`` is a number of rows (int) or a share of them (float).

    Raises:
        DataError: one of the two would have no rows.
    """
    try:
        parts = dataset.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise DataError(
            f"cannot hold out {test_size} of {len(dataset)} rows", "hold out 1 or more, and leave some to train on"
        ) from error
    return parts["train"], parts["test"]


def sample_balanced(dataset: Dataset, *, column: str, size: int, seed: int, shares: Mapping[str, float]) -> Dataset:
    """Sample ``size`` rows in random order, with a given share of each value of ``column``.

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


def fingerprint(records: Dataset, columns: Iterable[str]) -> str:
    """A SHA-256 hash of these columns, in the order of the rows."""
    digest = hashlib.sha256()
    for record in records.select_columns(list(dict.fromkeys(columns))):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()


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


def _load_file(source: str, split: str, columns: Sequence[str] | None) -> Dataset:
    import datasets
    import pyarrow as pa

    name, content = _read(source)
    try:
        cells = parse(content, Path(name).suffix, split=split, names=columns)
    except DataError as error:
        raise error.at(source) from error
    try:
        return datasets.Dataset.from_dict(cells)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        reason = _of_two_types(cells) or _first_line(error)
        raise DataError(f"{source}: {reason}; give every column values of one type") from error


def _of_two_types(columns: Mapping[str, Sequence[Any]]) -> str:
    """Say which column has values of two types; empty where the types differ only within lists or objects."""
    for name, values in columns.items():
        kinds = [(row, KINDS[type(value)]) for row, value in enumerate(values, start=1) if value is not None]
        for row, kind in kinds:
            if kind != kinds[0][1]:
                return f"column {name!r} has a {kind} in row {row} and a {kinds[0][1]} before"
    return ""


def _read(source: str) -> tuple[str, bytes]:
    """The name and the content of a file, or of a file in an archive.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    member, in_archive, file = source.removeprefix(ARCHIVED).partition("::")
    path = Path(file if in_archive else source).expanduser()
    if not path.exists():
        raise DataError(f"there is no file {path}; check the path")
    try:
        if not in_archive:
            return path.name, path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            return member, archive.read(member)
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error.strerror}); check the path") from error
    except KeyError as error:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        raise DataError(f"{path} has no {member}; name one of {quoted(names[:NAMED])}") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no zip archive, or damaged; restore it from a good copy") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
