"""Encodes records as token ids, with labels on the answer and places for virtual tokens.

A text is tokenized whole, and character offsets tell which tokens belong to a field. Only those are truncated to fit,
never the template's text or the answer. Knows nothing of models, padding or tensors.

The space before an answer. Byte-level BPE encodes " complaint" as one token, so in ``"Label : "`` the last space
belongs to the answer: it is removed from the prompt and put in front of the answer. Training on
"Label :" + " complaint" and predicting after "Label :" then use the same tokens. If the answer still changes how the
prompt before it is tokenized (nothing separates the two), the answer is tokenized on its own.

In a conversation (``chat``) the filled template is the user's turn, the answer the assistant's, and the text that is
tokenized is what the tokenizer's chat template makes of both, with its own special tokens and end of the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from softtune.data.chat import ASSISTANT, Chat, render, turn_after, user_turn_start
from softtune.data.records import cell_text
from softtune.data.templates import Template
from softtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKENS = "the text has no tokens; drop the row or add words to the template"
IGNORED = -100
"""Label of a token that the loss ignores."""

# What a character or a token belongs to: a field (the index of its part in the template, 0 or more) or one of these.
_SPACE = -1
_WORD = -2
_VIRTUAL = -3


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record, encoded."""

    input_ids: list[int]
    """T token ids; for a decoder that continues its prompt, the answer's among them."""
    labels: list[int]
    """T labels: -100 except at the answer's tokens (their ids) or at words' first tokens (their tags' class ids). If
    apart: the answer's token ids, or one class id."""
    span: tuple[int, int] | None = None
    """The first and the last token of the answer; both 0 where there is none. None for other tasks."""
    is_apart: bool = False
    """Whether the answer is not among ``input_ids``."""
    prompt_positions: list[int] | None = None
    """For each virtual token the index (0 to T) in ``input_ids`` before which it is placed; None without places."""
    token_type_ids: list[int] | None = None
    """For each token, which text of a pair it belongs to; None where the model does not use them."""
    prefix_mask: list[int] | None = None
    """For each virtual token of a prefix, 1 where the row sees it; None where it sees all."""
    truncated: int = 0
    """Number of the fields' tokens that were truncated."""
    from_fields: list[bool] | None = field(default=None, compare=False, repr=False)
    """For each of ``input_ids`` whether it is a field's, rather than the template's or the answer's; None where the
    example does not say."""


def encode_apart(
    template: Template,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: str | int | None = None,
    max_length: int,
    max_answer: int | None = None,
) -> Example:
    """Encode one record and its answer apart from the input: an encoder-decoder's target text, or a head's class id.

    Raises:
        DataError: as from ``encode``, or the answer has more than ``max_answer`` tokens.
    """
    prompt = encode(template, record, tokenizer, max_length=max_length)
    if answer is None:
        return prompt
    labels = [answer] if isinstance(answer, int) else list(tokenizer(text_target=answer)["input_ids"])
    if max_answer is not None and len(labels) > max_answer:
        raise DataError(f"the answer has {len(labels)} tokens, the model writes {max_answer} at most; shorten it")
    return replace(prompt, labels=labels, is_apart=True)


def longest(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest text."""
    return max(len(token_ids(text, tokenizer)) for text in texts)


@lru_cache(maxsize=8)
def longest_turn(texts: tuple[str, ...], chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest text as the assistant's turn with its end; cached, as every record needs it."""
    messages = chat.messages("a")
    turns = [turn_after(messages, {"role": ASSISTANT, "content": text}, tokenizer) for text in texts]
    return max(len(_answer_ids(before, turn, tokenizer)) for before, turn in turns)


def encode(
    template: Template,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: str | None = None,
    max_length: int,
    room: int = 0,
    add_eos: bool = False,
    chat: Chat | None = None,
) -> Example:
    """Encode one record in at most ``max_length`` tokens, virtual tokens not counted.

    ``room`` tokens are reserved for the answer, or as many as it has if that is more. With the same room, shorter
    answers follow the same text as longer ones.

    The special tokens that the tokenizer puts first (BOS, CLS) come first, also before virtual tokens at the start.
    Those that it puts last (SEP) come last if there is no ``answer``; an example with one ends with it, or with EOS if
    ``add_eos``. An answer of "" leaves the prompt open for generation, whatever the tokenizer puts last. With ``chat``,
    special tokens and the answer's end are those of the chat template.
    Records that are too long are truncated at the ends of their fields, the longest first.

    Raises:
        DataError: the record lacks a column or has no text in it, the input has no tokens, template and answer alone
            are too long, or the tokenizer is a slow one, has no EOS to add, or a chat template that does not fit.
    """
    check_fast(tokenizer)
    template.check(record.keys())
    if chat is not None:
        tokens, target = _in_chat(template, record, tokenizer, chat, answer or "")
        return _example(tokens, target, target, max_length=max_length, room=room)
    first, last = special_tokens(tokenizer)
    text, tokens = _prompt(template, record, tokenizer)
    tokens = [*(_Token(token, _WORD) for token in first), *tokens]
    target = _answer_ids(text, template.separator + answer, tokenizer) if answer else []
    if answer is not None and add_eos:
        target.append(_eos(tokenizer))
    return _example(tokens, last if answer is None else target, target, max_length=max_length, room=room)


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer tells character offsets.

    Raises:
        DataError: it does not.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, which tells no character offsets; load a fast one")


class _Token(NamedTuple):
    id: int
    owner: int


def _example(tokens: list[_Token], ending: list[int], target: list[int], *, max_length: int, room: int) -> Example:
    """A prompt's tokens, truncated to leave room for what follows; the labels are on ``target``, if there is one."""
    kept = _cut(tokens, max_length, reserved=max(len(ending), room))
    prompt_ids = [token.id for token in kept if token.owner != _VIRTUAL]
    if not prompt_ids + ending:
        raise DataError(NO_TOKENS)
    return Example(
        input_ids=prompt_ids + ending,
        labels=[IGNORED] * len(prompt_ids) + (target or [IGNORED] * len(ending)),
        prompt_positions=_positions(kept) if len(prompt_ids) < len(kept) else None,
        truncated=len(tokens) - len(kept),
        from_fields=[token.owner >= 0 for token in kept if token.owner != _VIRTUAL] + [False] * len(ending),
    )


def _in_chat(
    template: Template, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: Chat, answer: str
) -> tuple[list[_Token], list[int]]:
    """The tokens of a conversation up to where the assistant's turn begins, and the ids of that turn, if any."""
    text, owners = _filled(template, record)
    messages = chat.messages(text)
    if answer:
        prompt, turn = turn_after(messages, {"role": ASSISTANT, "content": answer}, tokenizer)
    else:
        prompt, turn = render(messages, tokenizer, add_generation_prompt=True), ""
    tokens = _tokenize(prompt, _owners_in(prompt, text, owners, user_turn_start(chat, tokenizer)), tokenizer)
    return tokens, _answer_ids(prompt, turn, tokenizer) if turn else []


def _filled(template: Template, record: Mapping[str, Any]) -> tuple[str, list[int]]:
    """A template without places of virtual tokens as text, and what each character belongs to."""
    text, owners = "", list[int]()
    for index, part in enumerate(template.parts):
        value = cell_text(record, part.value) if part.kind == "field" else part.value
        text, owners = text + value, owners + ([index] * len(value) if part.kind == "field" else _own(value))
    return text, owners


def _owners_in(prompt: str, text: str, owners: list[int], start: int) -> list[int]:
    """What each character of a rendered conversation belongs to, in which ``text`` begins at ``start``.

    Chat templates may remove the white space around a text. What they change otherwise belongs to no field.
    """
    around, stripped = _own(prompt), text.strip()
    for part, skipped in ((text, 0), (stripped, len(text) - len(text.lstrip()))):
        if prompt.startswith(part, start):
            return around[:start] + owners[skipped : skipped + len(part)] + around[start + len(part) :]
    return around


def _own(text: str) -> list[int]:
    """What characters belong to that are no field's."""
    return [_SPACE if char.isspace() else _WORD for char in text]


def _prompt(
    template: Template, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[_Token]]:
    """The text after the last virtual tokens, which an answer continues, and the prompt's tokens with virtual ones."""
    tokens: list[_Token] = []
    text, owners = "", list[int]()
    for index, part in enumerate(template.parts):
        if part.kind == "prompt":
            tokens += _tokenize(text, owners, tokenizer) + [_Token(_VIRTUAL, _VIRTUAL)] * int(part.value)
            text, owners = "", []
        elif part.kind == "field":
            value = cell_text(record, part.value)
            text, owners = text + value, owners + [index] * len(value)
        else:
            text, owners = text + part.value, owners + _own(part.value)
    text = text.removesuffix(template.separator)
    return text, tokens + _tokenize(text, owners, tokenizer)


def _tokenize(text: str, owners: list[int], tokenizer: PreTrainedTokenizerBase) -> list[_Token]:
    """Tokenize ``text``. A token belongs to a field if it covers characters of it and, of the template, only spaces.

    Args:
        text: the text.
        owners: for each character, what it belongs to.
        tokenizer: a fast one.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    covered = [owners[start:end] for start, end in encoding["offset_mapping"]]
    whose = [_WORD if _WORD in chars else max(chars, default=_WORD) for chars in covered]
    return [_Token(*token) for token in zip(encoding["input_ids"], whose, strict=True)]


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, without special tokens that the tokenizer would put around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _answer_ids(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's token ids after the prompt; tokenized on its own where it changes the prompt's tokens."""
    before, whole = token_ids(prompt, tokenizer), token_ids(prompt + answer, tokenizer)
    return whole[len(before) :] if whole[: len(before)] == before else token_ids(answer, tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def has_places_within(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template places virtual tokens anywhere but in front of the whole input, special tokens included."""
    kinds = [part.kind for part in template.parts]
    count = kinds.count("prompt")
    return "prompt" in kinds[count:] or (count > 0 and bool(special_tokens(tokenizer)[0]))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token or add_eos=False")
    return int(tokenizer.eos_token_id)


def _cut(tokens: list[_Token], max_length: int, *, reserved: int) -> list[_Token]:
    """Truncate fields so that all tokens but virtual ones, plus ``reserved`` ones, are at most ``max_length``.

    Raises:
        DataError: the tokens outside of fields are too many.
    """
    sizes = Counter(token.owner for token in tokens)
    fixed = sizes[_WORD] + sizes[_SPACE] + reserved
    if fixed > max_length:
        raise DataError(
            f"template and answer alone take {fixed} tokens, max_length is {max_length}; raise it or shorten them"
        )
    room = _shares({owner: size for owner, size in sizes.items() if owner >= 0}, max_length - fixed)
    seen: Counter[int] = Counter()
    kept = []
    for token in tokens:
        seen[token.owner] += 1
        if token.owner < 0 or seen[token.owner] <= room[token.owner]:
            kept.append(token)
    return kept


def _shares(sizes: dict[int, int], budget: int) -> dict[int, int]:
    """Divide ``budget`` evenly among the fields; what a short field leaves goes to longer ones."""
    shares = {}
    for rank, owner in enumerate(sorted(sizes, key=sizes.__getitem__)):
        shares[owner] = min(sizes[owner], budget // (len(sizes) - rank))
        budget -= shares[owner]
    return shares


def _positions(tokens: list[_Token]) -> list[int]:
    """For each virtual token, the number of real tokens before it."""
    virtual = [index for index, token in enumerate(tokens) if token.owner == _VIRTUAL]
    return [index - count for count, index in enumerate(virtual)]
