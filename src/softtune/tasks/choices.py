"""Multiple choice: every record has its own choices, one of which is the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softtune.data.chat import Chat
from softtune.data.encoding import Example, encode, longest, longest_turn
from softtune.data.records import cell_text
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import Prediction, chat_of, described_chat
from softtune.tasks.labels import Classification
from softtune.tasks.requests import Loglikelihood

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Classification):
    """Picks one of a record's own choices, by a decoder's probability of each."""

    template: Template
    """Formats a record as text."""
    choices: str
    """The column with the choices, a list of texts."""
    label_column: str
    """The column with the right choice: its text, or its index from 0. A text of digits is an index unless it is itself
    a choice."""
    max_length: int
    """Tokens of a record with a choice at most."""
    chat: Chat | None = None
    """How the text becomes a conversation, whose next turn is the choice; None for a text that the choice continues."""

    kind = TaskType.CAUSAL_LM

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.choices is not None

    @classmethod
    def from_recipe(cls, recipe: Any) -> ChoiceTask:
        """See ``Task``."""
        return cls(
            template=Template(recipe.template),
            choices=recipe.choices,
            label_column=recipe.label_column,
            max_length=recipe.max_length,
            chat=chat_of(recipe),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return tuple(dict.fromkeys((*self.template.fields, self.choices)))

    def reference(self, record: Mapping[str, Any]) -> str:
        """The text of the right choice.

        Raises:
            DataError: it is not among the choices, or a field has no text.
        """
        for field in self.template.fields:
            cell_text(record, field)
        choices, value = self.choices_in(record), record[self.label_column]
        if isinstance(value, str) and value in choices:
            return value
        if str(value).isdecimal() and int(value) < len(choices):
            return choices[int(value)]
        raise DataError(f"{value!r} is not one of {', '.join(map(repr, choices))}, nor the number of one from 0")

    def choices_in(self, record: Mapping[str, Any]) -> list[str]:
        """A record's choices.

        Raises:
            DataError: they are no list of two texts or more, or two are the same.
        """
        choices = record[self.choices]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"column {self.choices!r} holds no list of two texts or more; give the choices")
        if len({*choices}) < len(choices):
            raise DataError(f"column {self.choices!r} has the same choice twice; drop one of them")
        return choices

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example."""
        return [self.encode(record, tokenizer, self.reference(record))]

    def encode(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, choice: str) -> Example:
        """Encode a record with one of its choices and EOS, which tells a choice from a longer one that begins like it,
        or the end that the chat template writes.

        The record's text is truncated alike for every choice.
        """
        return encode(
            self.template,
            record,
            tokenizer,
            answer=choice,
            max_length=self.max_length,
            room=self._room(record, tokenizer),
            add_eos=True,
            chat=self.chat,
        )

    def _room(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
        """Number of tokens of a record's longest choice, with its end."""
        choices = self.choices_in(record)
        if self.chat is not None:
            return longest_turn(tuple(choices), self.chat, tokenizer)
        return longest([self.template.separator + choice for choice in choices], tokenizer) + 1

    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Loglikelihood]:
        """See ``Task``."""
        examples = [self.encode(record, tokenizer, choice) for choice in self.choices_in(record)]
        return [Loglikelihood(examples)]

    def num_choices(self, record: Mapping[str, Any]) -> int:
        """See ``Task``."""
        return len(self.choices_in(record))

    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Any],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """See ``Task``."""
        return self.predicted(self.choices_in(record), results[0], requests[0])

    def describe(self) -> dict[str, Any]:
        """See ``Task``."""
        return {"template": self.template.text, "choices": self.choices, **described_chat(self.chat)}

    def answer_text(self, record: Mapping[str, Any]) -> str:
        """What a labelled record's text continues with."""
        return self.reference(record)
