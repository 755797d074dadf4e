"""Encodes conversations as token ids, with labels on the assistant's turns.

Which tokens are the assistant's is said by the chat template where it has ``{% generation %}``. Elsewhere a turn is
what the rendering through it has more than that of the messages before, up to where the assistant's turn begins.

A conversation that is too long loses its oldest exchanges, each of which begins with a user's turn, but neither its
system prompt nor its last exchange.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from softtune.data.chat import (
    ASSISTANT,
    SYSTEM_ROLES,
    Message,
    chat_template_of,
    render,
    turn_after,
    without_space_at_end,
)
from softtune.data.encoding import IGNORED, Example, check_fast, token_ids
from softtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, max_length: int, turns: int | None = None
) -> Example:
    """Encode a conversation for training, in at most ``max_length`` tokens, virtual tokens not counted.

    Where its last exchange alone is longer, the end of that is cut.

    Args:
        messages: the conversation.
        tokenizer: a fast one with a chat template.
        max_length: tokens at most.
        turns: label the last so many of the assistant's turns; None for all.

    Raises:
        DataError: none of the assistant's tokens fit, the template does not tell which they are, or as from ``render``.
    """
    check_fast(tokenizer)
    kept, _, dropped = _fitted(messages, tokenizer, max_length)
    ids, labels = _labelled(kept, tokenizer, turns)
    if all(label == IGNORED for label in labels[:max_length]):
        begins = next(number for number, label in enumerate(labels) if label != IGNORED)
        raise _too_long(begins, max_length)
    cut = max(0, len(ids) - max_length)
    return Example(input_ids=ids[:max_length], labels=labels[:max_length], truncated=dropped + cut)


def encode_opening(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Example:
    """Encode a conversation up to where the assistant's next turn begins, in at most ``max_length`` tokens.

    Raises:
        DataError: its last exchange alone is longer, or as from ``render``.
    """
    check_fast(tokenizer)
    _, ids, dropped = _fitted_opening(messages, tokenizer, max_length)
    return Example(input_ids=ids, labels=[IGNORED] * len(ids), truncated=dropped)


def encode_reply(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_new_tokens: int
) -> Example:
    """Encode a conversation with labels on its last message alone, of which count as many tokens as may be generated.

    The messages before are truncated as in ``encode_opening``.

    Raises:
        DataError: as from ``encode_opening`` and ``encode_conversation``.
    """
    check_fast(tokenizer)
    kept, _, dropped = _fitted_opening(messages[:-1], tokenizer, max_length)
    ids, labels = _labelled([*kept, messages[-1]], tokenizer, 1)
    begins = next(number for number, label in enumerate(labels) if label != IGNORED)
    end = begins + max_new_tokens
    return Example(input_ids=ids[:end], labels=labels[:end], truncated=dropped)


def _fitted(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    add_generation_prompt: bool = False,
) -> tuple[list[Message], list[int], int]:
    """The conversation without as many of its oldest exchanges as do not fit, its token ids, and how many are left
    out."""

    def tokenized(kept: Sequence[Message]) -> list[int]:
        text = render(kept, tokenizer, add_generation_prompt=add_generation_prompt)
        return token_ids(text if add_generation_prompt else without_space_at_end(text, tokenizer), tokenizer)

    system, exchanges = _exchanges(messages)
    kept = [*messages]
    whole = ids = tokenized(kept)
    while len(ids) > max_length and len(exchanges) > 1:
        exchanges = exchanges[1:]
        kept = [*system, *chain.from_iterable(exchanges)]
        ids = tokenized(kept)
    return kept, ids, len(whole) - len(ids)


def _fitted_opening(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Message], list[int], int]:
    """See ``_fitted``, up to where the assistant's turn begins.

    Raises:
        DataError: the last exchange alone is too long.
    """
    kept, ids, dropped = _fitted(messages, tokenizer, max_length, add_generation_prompt=True)
    if len(ids) > max_length:
        raise _too_long(len(ids), max_length)
    return kept, ids, dropped


def _too_long(length: int, max_length: int) -> DataError:
    return DataError(
        f"the last exchange has {length} tokens before the assistant's turn, max_length is {max_length}; raise it or "
        "shorten the messages"
    )


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system prompt's messages, and the others by exchange."""
    roles = [message["role"] for message in messages]
    first = next((number for number, role in enumerate(roles) if role not in SYSTEM_ROLES), len(roles))
    exchanges: list[list[Message]] = []
    for number in range(first, len(messages)):
        if number == first or (roles[number] == "user" and roles[number - 1] != "user"):
            exchanges.append([])
        exchanges[-1].append(messages[number])
    return [*messages[:first]], exchanges


def _labelled(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, turns: int | None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation up to its last label, and the labels, on the last ``turns`` turns of the assistant.

    Raises:
        DataError: no token is the assistant's, or the template does not tell which are.
    """
    if _GENERATION.search(chat_template_of(tokenizer)):
        ids, is_assistants = _marked(messages, tokenizer)
    else:
        ids, is_assistants = _by_difference(messages, tokenizer)
    runs = _runs(is_assistants)
    if not runs:
        raise DataError("the chat template marks no token as the assistant's; correct its {% generation %}")
    labels = [IGNORED] * len(ids)
    for start, end in runs if turns is None else runs[-turns:]:
        labels[start:end] = ids[start:end]
    return ids[: runs[-1][1]], labels[: runs[-1][1]]


def _marked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the template's ``{% generation %}`` says are the assistant's."""
    render(messages, tokenizer)  # says what the template refuses
    encoding: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]


def _by_difference(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them have characters of the assistant's turns."""
    text = render(messages, tokenizer)
    spans = [*_turns(messages, text, tokenizer)]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    is_assistants = [any(start < last and first < end for first, last in spans) for start, end in offsets]
    return list(encoding["input_ids"]), is_assistants


def _turns(messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """The first character of each of the assistant's turns in a conversation's text, and the one behind its last.

    Raises:
        DataError: the template does not render the messages before a turn as a prefix of the conversation.
    """
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if not number:
            raise DataError("the conversation begins with the assistant's turn; put a user's in front, or drop the row")
        before, turn = turn_after(messages[:number], message, tokenizer)
        end = _turn_end(text, len(before), before + turn, message["content"].strip(), tokenizer)
        if not text.startswith(before) or end is None:
            raise DataError(
                f"the chat template writes message {number + 1} otherwise where others follow",
                "use one that marks the assistant's turns by {% generation %}",
            )
        yield len(before), end


def _turn_end(text: str, start: int, through: str, content: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where a turn ends in a conversation's text; None where it cannot be told.

    Some templates write the last turn otherwise than earlier ones, say with EOS or empty thoughts around it. Those end
    as both do alike behind the content.

    Args:
        text: the conversation's text.
        start: where the turn starts in it.
        through: the text of the conversation up to the turn, which is the last there.
        content: the turn's content.
        tokenizer: the tokenizer.
    """
    if text.startswith(through):
        return len(through)
    if not content or content not in text[start:] or content not in through[start:]:
        return None
    end, last = text.index(content, start) + len(content), through.rindex(content) + len(content)
    end += _common_length(text[end:], through[last:], tokenizer)
    return len(without_space_at_end(text[:end], tokenizer))


def _common_length(one: str, other: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of characters of the tokens that two texts both begin with."""
    encodings = [
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in (one, other)
    ]
    length = 0
    for a, b, (_, end) in zip(*(e["input_ids"] for e in encodings), encodings[0]["offset_mapping"], strict=False):
        if a != b:
            break
        length = end
    return length


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """The runs of marks: the first of each, and the one behind its last."""
    edges = [number for number, (a, b) in enumerate(zip([False, *marks], [*marks, False], strict=True)) if a != b]
    return [*zip(edges[::2], edges[1::2], strict=True)]
