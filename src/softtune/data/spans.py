"""Extractive question answering: the answer is a part of a text, or there is none.

A context that is too long is read in strides, each an example of its own. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from softtune.data.encoding import IGNORED, Example
from softtune.data.records import cell_text
from softtune.errors import DataError
from softtune.methods import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS = ("text", "answer_start")
"""What an answer in the data has."""


class Answer(NamedTuple):
    """A part of a context."""

    text: str
    start: int
    """Its first character."""

    @property
    def end(self) -> int:
        """Behind its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, kw_only=True)
class Stride:
    """A question and a part of its context."""

    example: Example
    places: list[tuple[int, int] | None]
    """For each token of the context the characters that it covers; None for other tokens."""


@dataclass(frozen=True, kw_only=True)
class SpanTask:
    """Questions on texts to parts of the texts."""

    question: str
    """The column with the question."""
    context: str
    """The column with the text that has the answer."""
    label_column: str
    """The column with the right answers: a list of ``{"text", "answer_start"}``, or SQuAD's object of two lists; empty
    for a question without an answer."""
    max_length: int
    """Tokens of question and context at most."""
    stride: int = 64
    """Tokens that neighbouring parts of a long context share."""
    max_answer: int = 30
    """Tokens of an answer at most."""
    may_be_unanswerable: bool = False
    """Whether there are questions without an answer."""

    kind = TaskType.QUESTION_ANS

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record to answer has."""
        return self.question, self.context

    def right(self, record: Mapping[str, Any]) -> list[Answer]:
        """A record's right answers.

        Raises:
            DataError: the answers are malformed, one does not stand where it says, or there is none and has to be.
        """
        context = cell_text(record, self.context)
        answers = list(_answers(record[self.label_column], self.label_column))
        if not answers and not self.may_be_unanswerable:
            raise DataError(f"column {self.label_column!r} has no answer; set unanswerable: true, or drop the row")
        for answer in answers:
            if context[answer.start : answer.end] != answer.text or not answer.text:
                raise DataError(
                    f"the answer {answer.text!r} is not at character {answer.start} of {self.context!r}; "
                    "count characters from 0 and copy the text to the letter"
                )
        return answers

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record as it is trained on: one example for each part of the context. A part without the whole
        answer has none."""
        answer = next(iter(self.right(record)), None)
        return [
            Example(
                input_ids=part.example.input_ids,
                labels=part.example.labels,
                token_type_ids=part.example.token_type_ids,
                span=(0, 0) if answer is None else _tokens_of(answer, part.places),
            )
            for part in self.prompts(record, tokenizer)
        ]

    def prompts(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Stride]:
        """A record to answer, part by part.

        Raises:
            DataError: the question leaves no room for the context.
        """
        question, context = cell_text(record, self.question), cell_text(record, self.context)
        words = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        fixed = len(words) + tokenizer.num_special_tokens_to_add(pair=True)
        if fixed + self.stride >= self.max_length:
            raise DataError(
                f"the question takes {fixed} tokens and the stride {self.stride} of {self.max_length}; "
                "raise max_length or lower stride"
            )
        encoding = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        return [_stride(encoding, i) for i in range(len(encoding["input_ids"]))]


def _stride(encoding: Any, index: int) -> Stride:
    ids, types = encoding["input_ids"][index], encoding.get("token_type_ids")
    pairs = zip(encoding["offset_mapping"][index], encoding.sequence_ids(index), strict=True)
    return Stride(
        example=Example(
            input_ids=ids,
            labels=[IGNORED] * len(ids),
            token_type_ids=None if types is None else types[index],
        ),
        places=[tuple(characters) if text == 1 else None for characters, text in pairs],
    )


def _tokens_of(answer: Answer, places: list[tuple[int, int] | None]) -> tuple[int, int]:
    """The first and the last token that cover an answer; (0, 0) where the part has not all of it."""
    covering = [i for i, own in enumerate(places) if own and own[0] < answer.end and own[1] > answer.start]
    if not covering:
        return 0, 0
    first, last = places[covering[0]], places[covering[-1]]
    assert first is not None
    assert last is not None
    return (covering[0], covering[-1]) if first[0] <= answer.start and last[1] >= answer.end else (0, 0)


def _answers(value: Any, column: str) -> Iterator[Answer]:
    if isinstance(value, dict):
        value = _rows_of(value, column)
    if not isinstance(value, list):
        raise DataError(
            f"column {column!r} holds no list of answers (CSV files have none); write {{text, answer_start}} for each"
        )
    for answer in value:
        text, start = (answer.get(name) for name in PARTS) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(start, int):
            raise DataError(f"column {column!r} has the answer {answer!r}; write 'text' and 'answer_start', a number")
        yield Answer(text, start)


def _rows_of(columns: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Answers of lists by name, as SQuAD has them."""
    lists: list[Any] = [columns.get(name) for name in PARTS]
    if not all(isinstance(own, list) for own in lists) or len({len(own) for own in lists}) > 1:
        raise DataError(f"column {column!r} has the answers {columns!r}; give 'text' and 'answer_start' lists as long")
    return [dict(zip(PARTS, own, strict=True)) for own in zip(*lists, strict=True)]
