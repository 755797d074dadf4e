"""Texts for records, such as sentences for tables or summaries, with one or several right ones to compare with."""

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
    """Records to texts."""

    kind: TaskType
    """CAUSAL_LM goes on from the record, SEQ_2_SEQ_LM writes apart from it."""
    template: Template
    """How a record reads."""
    label_column: str
    """The column with the right text, or a list of right texts."""
    max_length: int
    """Tokens of a record at most."""
    max_new_tokens: int
    """Tokens to write at most."""
    max_answer: int | None = None
    """Tokens of a text that the model can learn to write apart from the record; None for any number."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record to answer has."""
        return self.template.fields

    def right(self, record: Mapping[str, Any]) -> list[str]:
        """A record's references. Raises DataError where there is none, or a field has no text."""
        for field in self.template.fields:
            cell_text(record, field)
        value = record[self.label_column]
        texts = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(texts, list) or not texts or not all(str(text or "").strip() for text in texts):
            raise DataError(f"column {self.label_column!r} has no text to write; fill it in or drop the row")
        return [str(text) for text in texts]

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record as it is trained on: an example for each reference."""
        return [self.encode(record, tokenizer, text=text) for text in self.right(record)]

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, text: str | None = None
    ) -> Example:
        """One record as the base model reads it; with a text, as it is trained on."""
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
    """Labelled records, those that read alike made one with the references of all; other columns are the first's."""
    from datasets import Dataset

    references = each_row(records, [*task.columns, task.label_column], task.right)
    merged = []
    for rows in alike(records, task.columns):
        texts = dict.fromkeys(text for row in rows for text in references[row])
        merged.append({**records[rows[0]], task.label_column: [*texts]})
    return Dataset.from_list(merged)


def alike(records: Dataset, columns: Collection[str]) -> list[list[int]]:
    """The rows, from 0, of each of the records that do not read alike, in the order of their first ones."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(tuple(cell_text(record, column) for column in columns), []).append(row)
    return [*rows.values()]
