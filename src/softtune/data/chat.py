"""Renders conversations as text, by a tokenizer's chat template.

A conversation is a list of messages, each with a role and a content. Knows nothing of token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from softtune.errors import DataError
from softtune.formatting import in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
ASSISTANT = "assistant"
SYSTEM_ROLES = ("system", "developer")
PLACEHOLDER = "\uf8ff"
"""A character for private use, in place of a text whose beginning is looked for."""


@dataclass(frozen=True)
class Chat:
    """How a record's text becomes a conversation: the text is the user's turn, the answer the assistant's."""

    system: str | None = None
    """The system prompt; None for none."""

    def messages(self, text: str) -> list[Message]:
        """The conversation before the answer."""
        return with_system([{"role": "user", "content": text}], self.system)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Put a system prompt in front of a conversation, unless it has one."""
    if system is None or messages[0]["role"] in SYSTEM_ROLES:
        return [*messages]
    return [{"role": "system", "content": system}, *messages]


def messages_in(record: Mapping[str, Any], column: str, role: str) -> list[Message]:
    """A column's conversation; a text is one message of ``role``.

    Raises:
        DataError: it is neither, or a message has no role or no text.
    """
    value = record[column]
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise DataError(f"column {column!r} holds no conversation; make it a list of {{role, content}} or drop the row")
    return [_message(message, number, column) for number, message in enumerate(messages, start=1)]


def _message(message: Any, number: int, column: str) -> Message:
    """A message without its empty fields, which a data set has where other messages have more of them."""
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} in column {column!r} is no object; make it {{role, content}}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"message {number} in column {column!r} has no text as {key}; fill it in or drop the row")
    return {key: value for key, value in message.items() if value is not None}


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's chat template.

    Raises:
        DataError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError("the base model's tokenizer has no chat template", "use a chat model") from error


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    """A conversation as text; with ``add_generation_prompt`` up to where the assistant's turn begins.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses the messages.
    """
    from jinja2 import TemplateError

    chat_template_of(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, TypeError) as error:
        reason = in_one_line(error)
        raise DataError(f"the chat template refuses the messages ({reason})", "change their roles or order") from error


def turn_after(messages: Sequence[Message], turn: Message, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a conversation up to where the assistant's turn begins, and that of the turn with its end.

    Raises:
        DataError: the template does not render the one as a prefix of the other, or as from ``render``.
    """
    before = render(messages, tokenizer, add_generation_prompt=True)
    through = render([*messages, turn], tokenizer)
    if not through.startswith(before):
        raise DataError(
            "the chat template does not write the assistant's turn behind its own generation prompt",
            "use one that marks the turn by {% generation %}",
        )
    return before, without_space_at_end(through, tokenizer)[len(before) :]


def without_space_at_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A rendered text without the white space behind its last special token, with which generation would have ended."""
    stripped = text.rstrip()
    specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return stripped if stripped.endswith(specials) else text


@lru_cache(maxsize=8)
def user_turn_start(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of characters that the template writes before the user's text."""
    return len(render(chat.messages(PLACEHOLDER), tokenizer, add_generation_prompt=True).partition(PLACEHOLDER)[0])
