"""Multiple choice: every record has choices of its own, one of which is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softtune.data.encoding import Example, encode
from softtune.data.records import cell_text
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.methods import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """Records to one of their own choices, by a decoder that writes it."""

    template: Template
    """How a record reads."""
    choices: str
    """The column with the choices, a list of texts."""
    label_column: str
    """The column with the right choice: its text, or its number from 0. A text of digits is a number where no choice
    reads so."""
    max_length: int
    """Tokens of a record with a choice at most."""

    kind = TaskType.CAUSAL_LM

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record to answer has."""
        return tuple(dict.fromkeys((*self.template.fields, self.choices)))

    def right(self, record: Mapping[str, Any]) -> str:
        """The right choice's text. Raises DataError where it is not among the choices, or a field has no text."""
        for field in self.template.fields:
            cell_text(record, field)
        choices, value = self.of(record), record[self.label_column]
        if isinstance(value, str) and value in choices:
            return value
        if str(value).isdecimal() and int(value) < len(choices):
            return choices[int(value)]
        raise DataError(f"{value!r} is not one of {', '.join(map(repr, choices))}, nor the number of one from 0")

    def of(self, record: Mapping[str, Any]) -> list[str]:
        """A record's choices."""
        choices = record[self.choices]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"column {self.choices!r} holds no list of two texts or more; give the choices")
        if len({*choices}) < len(choices):
            raise DataError(f"column {self.choices!r} has the same choice twice; drop one of them")
        return choices

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record as it is trained on: one example."""
        return [self.encode(record, tokenizer, self.right(record))]

    def encode(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, choice: str) -> Example:
        """One record with one of its choices, which ends with an end so that longer ones may go on. Its text is cut to
        the same words for every choice."""
        answers = [self.template.separator + one for one in self.of(record)]
        room = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]) + 1
        return encode(
            self.template, record, tokenizer, answer=choice, max_length=self.max_length, room=room, add_eos=True
        )
