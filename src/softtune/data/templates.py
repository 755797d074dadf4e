"""Templates, which format records as text, and verbalizers, which map labels to words. Knows nothing of tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from softtune.data.records import cell_text, check_columns
from softtune.errors import DataError

_PIECE = re.compile(r"(?P<escape>\{\{|\}\})|\{(?P<braced>[^{}]*)\}|(?P<stray>[{}])|(?P<plain>[^{}]+)")


class TemplatePart(NamedTuple):
    """One part of a template: literal text, a column's name, or a number of virtual tokens."""

    kind: Literal["text", "field", "prompt"]
    value: str


@dataclass(frozen=True)
class Template:
    """Text with ``{column}`` fields and ``{prompt:N}`` places for N virtual tokens; ``{{`` and ``}}`` are braces.

    The text before a place of virtual tokens and that after it are tokenized separately. A place removes one space on
    either side: ``"{text} {prompt:2} answer:"`` has the texts "{text}" and "answer:". Write two spaces to keep one.

    Raises:
        DataError: a brace is stray, or a place has no number of virtual tokens.
    """

    text: str
    """The template, such as ``"Tweet text : {Tweet text} Label : "``."""

    def __post_init__(self) -> None:
        _ = self.parts  # a malformed template raises here, not at first use

    @cached_property
    def parts(self) -> tuple[TemplatePart, ...]:
        """Texts, fields and places of virtual tokens, in order."""
        return tuple(_without_spaces_at_places(list(_parse(self.text))))

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that the template names, each once."""
        return tuple(dict.fromkeys(part.value for part in self.parts if part.kind == "field"))

    @property
    def num_virtual_tokens(self) -> int:
        """Sum of N over its places of virtual tokens; 0 if it has none."""
        return sum(int(part.value) for part in self.parts if part.kind == "prompt")

    @property
    def separator(self) -> str:
        """The space at its end, which belongs to the answer; empty if there is none."""
        last = self.parts[-1] if self.parts else TemplatePart("text", "")
        return " " if last.kind == "text" and last.value.endswith(" ") else ""

    def filled(self, record: Mapping[str, Any]) -> str:
        """Format a record as text, without virtual tokens.

        Raises:
            DataError: a field has no text.
        """
        parts = (part for part in self.parts if part.kind != "prompt")
        return "".join(cell_text(record, part.value) if part.kind == "field" else part.value for part in parts)

    def check(self, columns: Collection[str]) -> None:
        """Check that ``columns`` has every column that the template names.

        Raises:
            DataError: a column is missing.
        """
        check_columns(self.fields, columns)


@dataclass(frozen=True)
class Verbalizer:
    """Maps a label in the data to the words that the model writes for it, and to a class id.

    Raises:
        DataError: a label has no words, or two have the same.
    """

    words: dict[str, str]
    """Label -> words, such as ``{"0": "negative", "1": "positive"}``; class ids follow this order."""

    def __post_init__(self) -> None:
        empty = [label for label, word in self.words.items() if not word]
        if empty or not self.words:
            raise DataError(f"labels has no words for {empty or 'any label'}; give every label its words")
        if len(set(self.words.values())) < len(self.words):
            raise DataError("two of labels have the same words; give every label its own")

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> Verbalizer:
        """Make a verbalizer whose labels are their own words; duplicates count once."""
        return cls({str(label): str(label) for label in labels})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in order of their class ids."""
        return tuple(self.words)

    @property
    def needs_end(self) -> bool:
        """Whether one label's words begin with another's, so that only EOS tells the two apart."""
        return any(a != b and b.startswith(a) for a in self.words.values() for b in self.words.values())

    def word(self, label: str | int) -> str:
        """The words for ``label``.

        Raises:
            DataError: there is no such label.
        """
        return self.words[self._known(label)]

    def index(self, label: str | int) -> int:
        """The class id of ``label``, for classification heads.

        Raises:
            DataError: there is no such label.
        """
        return self.labels.index(self._known(label))

    def _known(self, label: str | int) -> str:
        if str(label) in self.words:
            return str(label)
        known = ", ".join(map(repr, self.labels))
        raise DataError(f"label {label!r} is not one of {known}; add it to labels or fix the data")


def _parse(text: str) -> Iterator[TemplatePart]:
    for match in _PIECE.finditer(text):
        braced = match["braced"]
        if match["stray"] or braced == "":
            raise DataError(f"template {text!r} has a stray {match[0]!r}; write '{{{{' or '}}}}' for a brace as text")
        if braced is None:
            yield TemplatePart("text", match["plain"] or match["escape"][0])
        elif braced.startswith("prompt:"):
            yield TemplatePart("prompt", _virtual_tokens(braced))
        else:
            yield TemplatePart("field", braced)


def _virtual_tokens(braced: str) -> str:
    number = braced.removeprefix("prompt:").strip()
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*", number):
        raise DataError(f"{{{braced}}} in the template has no number of virtual tokens; write one of 1 or more")
    return number


def _without_spaces_at_places(parts: list[TemplatePart]) -> Iterator[TemplatePart]:
    """Remove one space from the text on either side of a place of virtual tokens."""
    kinds = ["", *(part.kind for part in parts), ""]
    for part, before, after in zip(parts, kinds[:-2], kinds[2:], strict=True):
        value = part.value
        if part.kind == "text":
            value = value.removeprefix(" ") if before == "prompt" else value
            value = value.removesuffix(" ") if after == "prompt" else value
        yield TemplatePart(part.kind, value)
