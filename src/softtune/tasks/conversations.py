"""Conversations, by the tokenizer's chat template: the assistant's turns are trained on, the next one is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softtune.data.chat import ASSISTANT, Chat, Message, messages_in, with_system
from softtune.data.conversations import encode_conversation, encode_opening, encode_reply
from softtune.data.encoding import Example
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import described_chat
from softtune.tasks.requests import Loglikelihood
from softtune.tasks.texts import Generation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WITHOUT = ("template", "label_column", "labels", "choices", "shares", "calibrate")
"""Fields of a recipe for records that a template formats."""


@dataclass(frozen=True, kw_only=True)
class ConversationTask(Generation):
    """Writes the assistant's next turn of a conversation."""

    prompt_column: str
    """The column with the conversation, or with what precedes the completion."""
    label_column: str
    """The column with the completion: the assistant's turns to train on, of which the last is the reference. Where it
    is the prompt's column, all of the assistant's turns are trained on."""
    system: str | None = None
    """System prompt of conversations without one; None for none."""
    max_length: int
    """Tokens of a conversation at most."""
    max_new_tokens: int
    """Tokens to generate at most."""
    splits_turns: bool = False
    """Whether each of the assistant's turns is an example of its own, since virtual tokens stand right before it."""

    kind = TaskType.CAUSAL_LM
    has_template = False

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.messages is not None

    @classmethod
    def check_recipe(cls, recipe: Any) -> None:
        """See ``Task``."""
        for name in WITHOUT:
            if getattr(recipe, name):
                raise ValueError(f"messages are whole conversations: drop {name}, or messages")

    @classmethod
    def from_recipe(cls, recipe: Any) -> ConversationTask:
        """See ``Task``."""
        columns = [recipe.messages] if isinstance(recipe.messages, str) else recipe.messages
        return cls(
            prompt_column=columns[0],
            label_column=columns[-1],
            system=recipe.system,
            max_length=recipe.max_length,
            max_new_tokens=recipe.max_new_tokens,
            splits_turns=getattr(recipe.config(), "placement", "prefix") != "prefix",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return (self.prompt_column,)

    @property
    def has_pairs(self) -> bool:
        """Whether the completion has a column of its own."""
        return self.label_column != self.prompt_column

    def has_references(self, records: Dataset) -> bool:
        """See ``Task``."""
        if self.has_pairs or self.label_column not in records.column_names:
            return super().has_references(records)
        return any(_ends_with_answer(value) for value in records[self.label_column])

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """The last turn's text.

        Raises:
            DataError: the last turn is not the assistant's, or has no text.
        """
        last = self._whole(record)[-1]
        if last["role"] != ASSISTANT:
            raise DataError(
                f"the conversation in column {self.label_column!r} does not end with the assistant's turn; add it or "
                "drop the row"
            )
        if not last["content"].strip():
            raise DataError(f"the last turn in column {self.label_column!r} has no text; fill it in or drop the row")
        return [last["content"]]

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example, or one for each of the assistant's turns."""
        self.reference(record)
        messages = self._whole(record)
        turns = [number for number, message in enumerate(messages, start=1) if message["role"] == ASSISTANT]
        if self.has_pairs:
            turns = [number for number in turns if number > len(self._prompt(record))]
        if not self.splits_turns:
            return [encode_conversation(messages, tokenizer, max_length=self.max_length, turns=len(turns))]
        return [
            encode_conversation(messages[:number], tokenizer, max_length=self.max_length, turns=1) for number in turns
        ]

    def prompt(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """See ``Task``. A conversation that ends with the assistant's turn is encoded up to that."""
        messages = self._prompt(record)
        if not self.has_pairs and len(messages) > 1 and messages[-1]["role"] == ASSISTANT:
            messages = messages[:-1]
        return encode_opening(messages, tokenizer, max_length=self.max_length)

    def reference_request(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Loglikelihood:
        """See ``Task``. Of a reference count about as many tokens as may be generated."""
        reply = encode_reply(
            self._whole(record), tokenizer, max_length=self.max_length, max_new_tokens=self.max_new_tokens
        )
        return Loglikelihood([reply])

    def describe(self) -> dict[str, Any]:
        """See ``Task``."""
        return described_chat(Chat(self.system))

    def _prompt(self, record: Mapping[str, Any]) -> list[Message]:
        """The messages in the prompt's column, with the system prompt."""
        return with_system(messages_in(record, self.prompt_column, "user"), self.system)

    def _whole(self, record: Mapping[str, Any]) -> list[Message]:
        """The whole conversation, with its completion."""
        completion = messages_in(record, self.label_column, ASSISTANT) if self.has_pairs else []
        return [*self._prompt(record), *completion]


def _ends_with_answer(value: Any) -> bool:
    """Whether a conversation's last turn is the assistant's."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[-1], Mapping)
        and (value[-1].get("role") == ASSISTANT)
    )
