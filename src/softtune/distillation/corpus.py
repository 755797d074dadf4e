"""Reads the text of a corpus, and cuts it into chunks that fit a model's context. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from softtune.data import load_records
from softtune.data.encoding import check_fast
from softtune.data.formats import FORMATS, quoted
from softtune.errors import DataError

PLAIN = (".txt", ".md")
"""Endings of files that are texts; those of ``data.formats`` are records, whose cells are."""
OVERLAP = 8
"""A chunk begins with the last eighth of the one before, so that each passage stands whole in one of them."""
SEPARATOR = "\n\n"
"""What stands between two files or records, and between a text and what follows it."""


@dataclass(frozen=True)
class Chunk:
    """A part of a text."""

    number: int
    text: str


def read_corpus(corpus: str | None, text: str | None, besides: Sequence[str | None] = ()) -> list[str]:
    """The texts of a corpus, one a file.

    Args:
        corpus: a file or a folder of files, of which those are read, with those below, whose endings are known; but
            none that is hidden or in a hidden folder.
        text: the text itself, instead.
        besides: files and folders that are no part of the text, where they are in its folder.

    Raises:
        DataError: there is no such file or folder, no text in it, or a file cannot be read.
    """
    if corpus is None:
        texts = [text or ""]
    else:
        path = Path(corpus).expanduser()
        if not path.exists():
            raise DataError(f"there is no file or folder {path}", "check the path")
        files = _files(path, {Path(other).expanduser().resolve() for other in besides if other is not None})
        known = [file for file in files if file.suffix.lower() in (*PLAIN, *FORMATS)]
        if files and not known:
            raise DataError(f"{path} has no text", f"give files that end in {quoted((*PLAIN, *FORMATS))}")
        texts = [_text_of(file) for file in known]
    found = [stripped for one in texts if (stripped := one.strip())]
    if not found:
        raise DataError(f"{corpus or 'the text'} has no text", "give a file with the text to distil")
    return found


def _files(path: Path, others: set[Path]) -> list[Path]:
    """A file, or the files of a folder that are not hidden, in order; without the others and what is in these."""
    if not path.is_dir():
        return [path] if path.resolve() not in others else []
    folders = {other for other in others if path.resolve() in other.parents}

    def is_text(file: Path) -> bool:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        place = file.resolve()
        return file.is_file() and not is_hidden and place not in others and folders.isdisjoint(place.parents)

    return [file for file in sorted(path.rglob("*")) if is_text(file)]


def _text_of(file: Path) -> str:
    """The text of a file; of records, all cells that are texts."""
    if file.suffix.lower() in PLAIN:
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 at byte {error.start}", "save the file as UTF-8") from error
    records = load_records(str(file))
    cells = ([str(value) for value in record.values() if isinstance(value, str)] for record in records)
    return SEPARATOR.join("\n".join(row) for row in cells)


def chunks_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[Chunk]:
    """Cut texts into chunks of about ``size`` tokens at most, none of which spans two texts.

    A text that is longer is cut into chunks of equal size, which overlap.
    """
    check_fast(tokenizer)
    parts = [part for text in texts for part in _cut(text, tokenizer, size)]
    return [Chunk(number, part) for number, part in enumerate(parts)]


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= size:
        return [text]
    stride = max(size - size // OVERLAP, 1)
    count = -(-(len(offsets) - size) // stride) + 1
    starts = [round(i * (len(offsets) - size) / (count - 1)) for i in range(count)]
    return [text[offsets[start][0] : offsets[start + size - 1][1]].strip() for start in starts]
