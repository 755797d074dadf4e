"""Templates and verbalizers: records to text to token ids, with labels on the answer and places for virtual tokens.

A text is tokenized whole, and character offsets tell which tokens are a field's: those may be cut to fit, the
template's words and the answer may not. Knows nothing of models, padding or tensors.

The space before an answer. Byte-level BPE writes " complaint" as one token, so in ``"Label : "`` the last space belongs
to the answer: it is taken off the prompt and put in front of the answer. Training on "Label :" + " complaint" and asking
with "Label :" then meet the same tokens. Should the answer still change how the prompt before it is tokenized (nothing
separates the two), the answer is tokenized on its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from softtune.data.sources import check_columns
from softtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that the loss leaves out."""

# Who owns a character or a token: a field (the index of its part in the template, 0 or more) or none of them.
_SPACE = -1
_WORD = -2
_VIRTUAL = -3

_PIECE = re.compile(r"(?P<escape>\{\{|\}\})|\{(?P<braced>[^{}]*)\}|(?P<stray>[{}])|(?P<plain>[^{}]+)")


class Part(NamedTuple):
    """One stretch of a template: words as they are, a column's name, or a number of virtual tokens."""

    kind: Literal["text", "field", "prompt"]
    value: str


@dataclass(frozen=True)
class Template:
    """Text with ``{column}`` fields and ``{prompt:N}`` places for N virtual tokens; ``{{`` and ``}}`` are braces.

    A text before and one after a place of virtual tokens are tokenized apart, and a place takes one space on either
    side with it: ``"{text} {prompt:2} answer:"`` has the words "{text}" and "answer:". Write two spaces to keep one.
    """

    text: str
    """The template, such as ``"Tweet text : {Tweet text} Label : "``."""

    def __post_init__(self) -> None:
        _ = self.parts  # a malformed template raises here, not at first use

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Words, fields and places in order."""
        return tuple(_without_spaces_at_places(list(_parse(self.text))))

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns it names, each once."""
        return tuple(dict.fromkeys(part.value for part in self.parts if part.kind == "field"))

    @property
    def num_virtual_tokens(self) -> int:
        """The sum of N over its places; 0 when it has none."""
        return sum(int(part.value) for part in self.parts if part.kind == "prompt")

    @property
    def separator(self) -> str:
        """The space at its end, which is the answer's; else nothing."""
        last = self.parts[-1] if self.parts else Part("text", "")
        return " " if last.kind == "text" and last.value.endswith(" ") else ""

    def check(self, columns: Collection[str]) -> None:
        """Raise ``DataError`` when a column that it names is not among ``columns``."""
        check_columns(self.fields, columns)


@dataclass(frozen=True)
class Verbalizer:
    """Maps a label in the data to the words that the model writes for it, and to a class id."""

    words: dict[str, str]
    """Label -> words, such as ``{"0": "negative", "1": "positive"}``; class ids count in this order."""

    def __post_init__(self) -> None:
        empty = [label for label, word in self.words.items() if not word]
        if empty or not self.words:
            raise DataError(f"the verbalizer has no words for {empty or 'any label'}; give every label its words")

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> Verbalizer:
        """Every label is its own word; one that comes twice counts once."""
        return cls({str(label): str(label) for label in labels})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in order of their class ids."""
        return tuple(self.words)

    def word(self, label: str | int, *, row: int | None = None) -> str:
        """The words for ``label``; ``row`` is for the message when there are none."""
        return self.words[self._known(label, row)]

    def index(self, label: str | int, *, row: int | None = None) -> int:
        """The class id of ``label``, for classification heads."""
        return self.labels.index(self._known(label, row))

    def _known(self, label: str | int, row: int | None) -> str:
        if str(label) in self.words:
            return str(label)
        place = "" if row is None else f"row {row}: "
        known = ", ".join(map(repr, self.labels))
        raise DataError(f"{place}label {label!r} is not one of {known}; add it to the verbalizer or fix the data")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as token ids; T of them."""

    input_ids: list[int]
    """Prompt and answer, T ids."""
    labels: list[int]
    """T labels: -100, but on the answer's tokens their ids."""
    prompt_positions: list[int] | None = None
    """For each virtual token the index (0 to T) in ``input_ids`` before which it stands; None for no places."""
    truncated: int = 0
    """How many tokens of the fields' text were cut."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Many records as token ids."""

    examples: list[Example]
    """One example a record, in their order."""
    truncated: int
    """How many examples were cut."""


def encode_records(
    dataset: Dataset,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    verbalizer: Verbalizer | None = None,
    label_column: str | None = None,
    max_length: int,
    add_eos: bool = False,
) -> Encoded:
    """Encode every record; its answer is what ``label_column`` holds, in the verbalizer's words if there is one.

    Without a ``label_column`` there are no answers. Messages name the row, counted from 1.
    """
    check_columns([*template.fields, *([] if label_column is None else [label_column])], dataset.column_names)
    examples = []
    for row, record in enumerate(dataset, start=1):
        try:
            answer = None if label_column is None else _answer(record, label_column, verbalizer)
            examples.append(encode(template, record, tokenizer, answer=answer, max_length=max_length, add_eos=add_eos))
        except DataError as error:
            raise DataError(f"row {row}: {error}") from error
    return Encoded(examples=examples, truncated=sum(example.truncated > 0 for example in examples))


def encode(
    template: Template,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: str | None = None,
    max_length: int,
    add_eos: bool = False,
) -> Example:
    """Encode one record in at most ``max_length`` tokens, virtual tokens not counted.

    The special tokens that the tokenizer puts first (BOS, CLS) come first, before a leading place too. Those that it
    puts last (SEP) come last if there is no ``answer``; an example with one ends with it, or with EOS if ``add_eos``.
    An answer of "" leaves the prompt open, as generation wants it, whatever the tokenizer puts last.
    What is too long is cut from the ends of the fields, the longest first.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, which tells no character offsets; load a fast one")
    template.check(record.keys())
    first, last = _special_tokens(tokenizer)
    text, tokens = _prompt(template, record, tokenizer)
    tokens = [*(_Token(id, _WORD) for id in first), *tokens]
    target = _answer_ids(text, template.separator + answer, tokenizer) if answer else []
    if answer is not None and add_eos:
        target.append(_eos(tokenizer))
    ending = last if answer is None else target
    kept = _cut(tokens, max_length, reserved=len(ending))
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


def _parse(text: str) -> Iterator[Part]:
    for match in _PIECE.finditer(text):
        braced = match["braced"]
        if match["stray"] or braced == "":
            raise DataError(f"template {text!r} has a stray {match[0]!r}; write '{{{{' or '}}}}' for a brace as text")
        if braced is None:
            yield Part("text", match["plain"] or match["escape"][0])
        elif braced.startswith("prompt:"):
            yield Part("prompt", _virtual_tokens(braced))
        else:
            yield Part("field", braced)


def _virtual_tokens(braced: str) -> str:
    number = braced.removeprefix("prompt:").strip()
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*", number):
        raise DataError(f"{{{braced}}} in the template has no number of virtual tokens; write one of 1 or more")
    return number


def _without_spaces_at_places(parts: list[Part]) -> Iterator[Part]:
    """Take one space off the words on either side of a place."""
    kinds = ["", *(part.kind for part in parts), ""]
    for part, before, after in zip(parts, kinds[:-2], kinds[2:], strict=True):
        value = part.value
        if part.kind == "text":
            value = value.removeprefix(" ") if before == "prompt" else value
            value = value.removesuffix(" ") if after == "prompt" else value
        yield Part(part.kind, value)


def _answer(record: Mapping[str, Any], column: str, verbalizer: Verbalizer | None) -> str:
    label = _text_of(record, column)
    if verbalizer is not None:
        return verbalizer.word(label)
    if not label:
        raise DataError(f"column {column!r} is empty and so there is no answer; fill it in or drop the row")
    return label


def _text_of(record: Mapping[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, (str, int, float)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"column {column!r} holds {kind}; make it text or drop the row")
    return str(value)


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
            value = _text_of(record, part.value)
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
    return [_Token(id, owner) for id, owner in zip(encoding["input_ids"], whose, strict=True)]


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
            f"the template and the answer alone take {fixed} tokens, max_length is {max_length}; raise it or shorten them"
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
