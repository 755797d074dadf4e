"""Text generation, such as table-to-text or summarization, with one or several references for each record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softtune.data.encoding import Example, encode, encode_apart
from softtune.data.records import cell_text, each_row
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.methods import TaskType

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Generates a text for each record."""

    kind: TaskType
    """CAUSAL_LM continues the record's text, SEQ_2_SEQ_LM encodes it and writes with its decoder."""
    template: Template
    """Formats a record as text."""
    label_column: str
    """The column with the reference text, or a list of reference texts."""
    max_length: int
    """Tokens of a record at most."""
    max_new_tokens: int
    """Tokens to generate at most."""
    max_answer: int | None = None
    """Tokens of a reference at most, where it is encoded apart from the record; None for no limit."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return self.template.fields

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """A record's reference texts.

        Raises:
            DataError: there is none, or a field has no text.
        """
        for field in self.template.fields:
            cell_text(record, field)
        value = record[self.label_column]
        texts = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(texts, list) or not texts or not all(str(text or "").strip() for text in texts):
            raise DataError(f"column {self.label_column!r} has no text to write; fill it in or drop the row")
        return [str(text) for text in texts]

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example for each reference."""
        return [self.encode(record, tokenizer, text=text) for text in self.reference(record)]

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, text: str | None = None
    ) -> Example:
        """Encode a record, with a reference text for training, without one for generation."""
        if self.kind is TaskType.CAUSAL_LM:
            return encode(
                self.template,
                record,
                tokenizer,
                answer=text or "",
                max_length=self.max_length,
                add_eos=text is not None,
            )
        return encode_apart(
            self.template, record, tokenizer, answer=text, max_length=self.max_length, max_answer=self.max_answer
        )


def with_all_references(records: Dataset, task: TextTask) -> Dataset:
    """Merge labelled records with the same input into one with all their references; other columns are the first's."""
    from datasets import Dataset

    references = each_row(records, [*task.columns, task.label_column], task.reference)
    merged = []
    for rows in alike(records, task.columns):
        texts = dict.fromkeys(text for row in rows for text in references[row])
        merged.append({**records[rows[0]], task.label_column: [*texts]})
    return Dataset.from_list(merged)


def alike(records: Dataset, columns: Collection[str]) -> list[list[int]]:
    """Group the indices of rows with the same input in ``columns``, in the order of each group's first row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(tuple(cell_text(record, column) for column in columns), []).append(row)
    return [*rows.values()]
