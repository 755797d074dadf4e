"""A task: how its records read, what their labels are, and what kind of model answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from softtune.data.encoding import Example, cell_text, encode, encode_apart, longest, text_of
from softtune.data.templates import Template, Verbalizer
from softtune.methods import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task."""

    kind: TaskType
    """CAUSAL_LM and SEQ_2_SEQ_LM write the label, SEQ_CLS has a head for it."""
    template: Template
    """How a record reads."""
    label_column: str
    """The column with the label, or with the text to write."""
    verbalizer: Verbalizer | None
    """Labels and their words; None for free text."""
    max_length: int
    """Tokens of a record at most."""
    max_new_tokens: int
    """Tokens to write at most, where there is no verbalizer."""
    max_answer: int | None = None
    """Tokens of an answer that the model can learn to write apart from the record; None for any number."""

    @property
    def has_head(self) -> bool:
        return self.kind is TaskType.SEQ_CLS

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise DataError where a labelled record has no text in a field, or not one of the labels."""
        for field in self.template.fields:
            cell_text(record, field)
        self.label_of(record)

    def label_of(self, record: Mapping[str, Any]) -> str:
        """A record's label. Raises DataError where there is none, or one outside the verbalizer."""
        label = text_of(record, self.label_column)
        if self.verbalizer is not None:
            self.verbalizer.word(label)
        return label

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, label: str | None = None
    ) -> Example:
        """One record as the base model reads it; with a label, as it is trained on. Its text is cut to the same words
        for every label, and for none."""
        if self.kind is TaskType.CAUSAL_LM:
            answer = self._answer(label) if label is not None else ""
            return encode(
                self.template,
                record,
                tokenizer,
                answer=answer,
                max_length=self.max_length,
                room=self._room(tokenizer),
                add_eos=self._ends and label is not None,
            )
        target = None if label is None else self._class_id(label) if self.has_head else self._answer(label)
        return encode_apart(
            self.template, record, tokenizer, answer=target, max_length=self.max_length, max_answer=self.max_answer
        )

    @property
    def _ends(self) -> bool:
        """Whether an answer needs an end."""
        return self.verbalizer is None or self.verbalizer.needs_end

    def _room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest label; 0 where there are none."""
        if self.verbalizer is None:
            return 0
        return _longest_answer(tuple(self.verbalizer.words.values()), self.template.separator, tokenizer) + self._ends

    def _answer(self, label: str) -> str:
        return label if self.verbalizer is None else self.verbalizer.word(label)

    def _class_id(self, label: str) -> int:
        assert self.verbalizer is not None
        return self.verbalizer.index(label)


@lru_cache(maxsize=8)
def _longest_answer(words: tuple[str, ...], separator: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Asked for with every record."""
    return longest((separator + word for word in words), tokenizer)
