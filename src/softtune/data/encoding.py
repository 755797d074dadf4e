"""Records to token ids, with labels on the answer and places for virtual tokens.

A text is tokenized whole, and character offsets tell which tokens are a field's: those may be cut to fit, the
template's words and the answer may not. Knows nothing of models, padding or tensors.

The space before an answer. Byte-level BPE writes " complaint" as one token, so in ``"Label : "`` the last space
belongs to the answer: it is taken off the prompt and put in front of the answer. Training on "Label :" + " complaint"
and asking with "Label :" then meet the same tokens. Should the answer still change how the prompt before it is
tokenized (nothing separates the two), the answer is tokenized on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from softtune.data.records import cell_text
from softtune.data.templates import Template
from softtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that the loss leaves out."""

# Who owns a character or a token: a field (the index of its part in the template, 0 or more) or none of them.
_SPACE = -1
_WORD = -2
_VIRTUAL = -3


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as token ids."""

    input_ids: list[int]
    """What the model reads: T ids, the answer among them where a decoder goes on from its prompt."""
    labels: list[int]
    """T labels: -100, but on the answer's tokens their ids. Apart: the answer's ids, or one class id."""
    span: tuple[int, int] | None = None
    """The first and the last token of the answer; both 0 where there is none. None for other tasks."""
    is_apart: bool = False
    """Whether the answer is not among ``input_ids``."""
    prompt_positions: list[int] | None = None
    """For each virtual token the index (0 to T) in ``input_ids`` before which it stands; None for no places."""
    token_type_ids: list[int] | None = None
    """For each id, which text of a pair it is of; None where the model is not told."""
    truncated: int = 0
    """How many tokens of the fields' text were cut."""


def encode_apart(
    template: Template,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: str | int | None = None,
    max_length: int,
    max_answer: int | None = None,
) -> Example:
    """Encode one record whose answer the model does not read: an encoder-decoder's target text, or a head's class id.

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


def longest(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the longest of some words has."""
    return max(len(_ids(word, tokenizer)) for word in words)


def encode(
    template: Template,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: str | None = None,
    max_length: int,
    room: int = 0,
    add_eos: bool = False,
) -> Example:
    """Encode one record in at most ``max_length`` tokens, virtual tokens not counted.

    For the answer ``room`` tokens are kept free, or as many as it has if that is more: then shorter answers follow the
    same text as longer ones.

    The special tokens that the tokenizer puts first (BOS, CLS) come first, before a leading place too. Those that it
    puts last (SEP) come last if there is no ``answer``; an example with one ends with it, or with EOS if ``add_eos``.
    An answer of "" leaves the prompt open, as generation wants it, whatever the tokenizer puts last.
    What is too long is cut from the ends of the fields, the longest first.

    Raises:
        DataError: the record lacks a column or has no text in it, nothing is left to read, template and answer alone
            are too long, or the tokenizer is a slow one or has no EOS to add.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, which tells no character offsets; load a fast one")
    template.check(record.keys())
    first, last = _special_tokens(tokenizer)
    text, tokens = _prompt(template, record, tokenizer)
    tokens = [*(_Token(token, _WORD) for token in first), *tokens]
    target = _answer_ids(text, template.separator + answer, tokenizer) if answer else []
    if answer is not None and add_eos:
        target.append(_eos(tokenizer))
    ending = last if answer is None else target
    kept = _cut(tokens, max_length, reserved=max(len(ending), room))
    prompt_ids = [token.id for token in kept if token.owner != _VIRTUAL]
    if not prompt_ids + ending:
        raise DataError("the text has no tokens; drop the row or add words to the template")
    return Example(
        input_ids=prompt_ids + ending,
        labels=[IGNORED] * len(prompt_ids) + (target or [IGNORED] * len(ending)),
        prompt_positions=_positions(kept) if template.num_virtual_tokens else None,
        truncated=len(tokens) - len(kept),
    )


class _Token(NamedTuple):
    id: int
    owner: int


def _prompt(
    template: Template, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[_Token]]:
    """The prompt's tokens, virtual ones among them, and the text since the last place, which an answer continues."""
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
            text, owners = text + part.value, owners + [_SPACE if char.isspace() else _WORD for char in part.value]
    text = text.removesuffix(template.separator)
    return text, tokens + _tokenize(text, owners, tokenizer)


def _tokenize(text: str, owners: list[int], tokenizer: PreTrainedTokenizerBase) -> list[_Token]:
    """Tokenize ``text``; a token is a field's if it covers characters of it and no word of the template."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    covered = [owners[start:end] for start, end in encoding["offset_mapping"]]
    whose = [_WORD if _WORD in chars else max(chars, default=_WORD) for chars in covered]
    return [_Token(*token) for token in zip(encoding["input_ids"], whose, strict=True)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _answer_ids(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's tokens as they follow the prompt's; on their own where the two do not come apart."""
    before, whole = _ids(prompt, tokenizer), _ids(prompt + answer, tokenizer)
    return whole[len(before) :] if whole[: len(before)] == before else _ids(answer, tokenizer)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text, seen on a short one."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def has_places_within(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether virtual tokens stand elsewhere than in front of all that the model reads."""
    kinds = [part.kind for part in template.parts]
    count = kinds.count("prompt")
    return "prompt" in kinds[count:] or (count > 0 and bool(_special_tokens(tokenizer)[0]))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token or add_eos=False")
    return int(tokenizer.eos_token_id)


def _cut(tokens: list[_Token], max_length: int, *, reserved: int) -> list[_Token]:
    """Cut fields so that all but virtual tokens, and ``reserved`` ones to come, are at most ``max_length``."""
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
    """Give every field the same room; what a short one leaves goes to the longer ones."""
    shares = {}
    for rank, owner in enumerate(sorted(sizes, key=sizes.__getitem__)):
        shares[owner] = min(sizes[owner], budget // (len(sizes) - rank))
        budget -= shares[owner]
    return shares


def _positions(tokens: list[_Token]) -> list[int]:
    """For each virtual token, how many real ones stand before it."""
    virtual = [index for index, token in enumerate(tokens) if token.owner == _VIRTUAL]
    return [index - count for count, index in enumerate(virtual)]
