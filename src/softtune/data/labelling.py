"""Labels for texts: written in words by a language model, or told by a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from softtune.data.encoding import Example, encode, encode_apart, longest
from softtune.data.records import cell_text, text_of
from softtune.data.templates import Template, Verbalizer
from softtune.methods import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT_FREE = "N/A"
"""What stands in a record's fields where nothing is said (Zhao et al. 2021, Calibrate Before Use)."""


@dataclass(frozen=True, kw_only=True)
class LabelTask:
    """Records to one of some labels."""

    kind: TaskType
    """CAUSAL_LM and SEQ_2_SEQ_LM write the label, SEQ_CLS has a head for it."""
    template: Template
    """How a record reads."""
    label_column: str
    """The column with the label."""
    verbalizer: Verbalizer
    """Labels and their words."""
    max_length: int
    """Tokens of a record at most."""
    max_answer: int | None = None
    """Tokens of a label that the model can write apart from the record; None for any number."""
    is_calibrated: bool = False
    """Whether labels' probabilities are divided by those that they have where nothing is said."""

    @property
    def has_head(self) -> bool:
        return self.kind is TaskType.SEQ_CLS

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record to answer has."""
        return self.template.fields

    @property
    def nothing_said(self) -> dict[str, str]:
        """A record without content."""
        return dict.fromkeys(self.columns, CONTENT_FREE)

    def right(self, record: Mapping[str, Any]) -> str:
        """A record's label. Raises DataError where it is none of the verbalizer's, or a field has no text."""
        for field in self.template.fields:
            cell_text(record, field)
        label = text_of(record, self.label_column)
        self.verbalizer.word(label)
        return label

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record as it is trained on: one example."""
        return [self.encode(record, tokenizer, label=self.right(record))]

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, label: str | None = None
    ) -> Example:
        """One record as the base model reads it; with a label, as it is trained on. Its text is cut to the same words
        for every label, and for none."""
        if self.kind is TaskType.CAUSAL_LM:
            return encode(
                self.template,
                record,
                tokenizer,
                answer="" if label is None else self.verbalizer.word(label),
                max_length=self.max_length,
                room=self._room(tokenizer),
                add_eos=self.verbalizer.needs_end and label is not None,
            )
        target: str | int | None = None
        if label is not None:
            target = self.verbalizer.index(label) if self.has_head else self.verbalizer.word(label)
        return encode_apart(
            self.template, record, tokenizer, answer=target, max_length=self.max_length, max_answer=self.max_answer
        )

    def _room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest label."""
        words = tuple(self.template.separator + word for word in self.verbalizer.words.values())
        return _longest(words, tokenizer) + self.verbalizer.needs_end


@lru_cache(maxsize=8)
def _longest(words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    """Asked for with every record."""
    return longest(words, tokenizer)
