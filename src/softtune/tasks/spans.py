"""Extractive question answering: the answer is a span of the context, or there is none.

A context that is too long is split into overlapping parts, each with the question an example of its own. Knows nothing
of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from softtune.data.encoding import IGNORED, Example
from softtune.data.records import cell_text
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import Prediction, Task
from softtune.tasks.metrics import SPAN_METRICS, Quality, span_quality
from softtune.tasks.requests import LocateSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS = ("text", "answer_start")
"""Keys of an answer in the data."""


class AnswerSpan(NamedTuple):
    """A span of a context."""

    text: str
    start: int
    """Index of its first character."""

    @property
    def end(self) -> int:
        """Index after its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, eq=False)
class Stride(LocateSpan):
    """A question and one part of its context."""

    places: list[tuple[int, int] | None]
    """For each token of the context the start and end of its characters; None for other tokens."""


@dataclass(frozen=True, kw_only=True)
class SpanTask(Task):
    """Answers questions with spans of their contexts."""

    question: str
    """The column with the question."""
    context: str
    """The column with the text that contains the answer."""
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
    metrics = SPAN_METRICS
    needs_metrics = False
    endpoint = "/v1/answer"
    endpoint_summary = "Tell which parts of records' texts answer their questions; an empty one where none does."
    asks_for = "answers"
    bare_template = "{question} {context}"

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.task is TaskType.QUESTION_ANS

    @classmethod
    def check_recipe(cls, recipe: Any) -> None:
        """See ``Task``."""
        if recipe.labels:
            raise ValueError("QUESTION_ANS answers with parts of a text: drop labels")

    @classmethod
    def from_recipe(cls, recipe: Any) -> SpanTask:
        """See ``Task``."""
        question, context = Template(recipe.template).fields
        return cls(
            question=question,
            context=context,
            label_column=recipe.label_column,
            max_length=recipe.max_length,
            stride=recipe.stride,
            may_be_unanswerable=recipe.unanswerable,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return self.question, self.context

    def reference(self, record: Mapping[str, Any]) -> list[AnswerSpan]:
        """A record's right answers.

        Raises:
            DataError: the answers are malformed, one is not at its ``answer_start``, or there is none though the task
                requires one.
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
        """Encode a labelled record for training: one example for each part of the context.

        A part that does not contain the whole answer counts as without one.
        """
        answer = next(iter(self.reference(record)), None)
        return [
            Example(
                input_ids=part.example.input_ids,
                labels=part.example.labels,
                token_type_ids=part.example.token_type_ids,
                span=(0, 0) if answer is None else _tokens_of(answer, part.places),
            )
            for part in self.requests(record, tokenizer)
        ]

    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Stride]:
        """See ``Task``: the question with each part of the context.

        Raises:
            DataError: the question leaves no room for the context.
        """
        question, context = cell_text(record, self.question), cell_text(record, self.context)
        question_ids = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        fixed = len(question_ids) + tokenizer.num_special_tokens_to_add(pair=True)
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

    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Any],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """See ``Task``: the most likely span of all parts (Devlin et al. 2019, section 4.3)."""
        parts = [(request, *result) for request, result in zip(requests, results, strict=True)]
        start, end = best_span(self, parts)
        return Prediction(answer=record[self.context][start:end], span=(start, end))

    def measure(
        self, references: Sequence[Sequence[AnswerSpan]], answers: Sequence[str], likelihoods: Tensor | None = None
    ) -> Quality:
        """See ``Task``."""
        return span_quality([[one.text for one in several] for several in references], answers)

    def as_json(self, prediction: Prediction) -> dict[str, Any]:
        """See ``Task``."""
        assert prediction.span is not None
        start, end = prediction.span
        return {"answer": prediction.answer, "start": start, "end": end}


def _stride(encoding: Any, index: int) -> Stride:
    input_ids, types = encoding["input_ids"][index], encoding.get("token_type_ids")
    pairs = zip(encoding["offset_mapping"][index], encoding.sequence_ids(index), strict=True)
    return Stride(
        example=Example(
            input_ids=input_ids,
            labels=[IGNORED] * len(input_ids),
            token_type_ids=None if types is None else types[index],
        ),
        places=[tuple(characters) if text == 1 else None for characters, text in pairs],
    )


def best_span(task: SpanTask, parts: Sequence[tuple[Stride, Tensor, Tensor]]) -> tuple[int, int]:
    """Start and end character of the most likely answer over all strides of a context. If the task has unanswerable
    questions, (0, 0) where "no answer" scores higher in every stride (Devlin et al. 2019, section 4.3)."""
    best, place = -torch.inf, (0, 0)
    for part, first, last in parts:
        inside = torch.tensor([covered is not None for covered in part.places])
        pairs = torch.full((len(inside), len(inside)), -torch.inf).masked_fill(inside[:, None] & inside, 0)
        pairs = (pairs + first[:, None] + last).triu().masked_fill(~_short(len(inside), task.max_answer), -torch.inf)
        score, index = float(pairs.max()), int(pairs.argmax())
        start, end = part.places[index // len(inside)], part.places[index % len(inside)]
        if score > best and start is not None and end is not None:
            best, place = score, (start[0], end[1])
    nothing = min(float(first[0] + last[0]) for _, first, last in parts)
    return (0, 0) if task.may_be_unanswerable and nothing > best else place


def _short(length: int, longest: int) -> Tensor:
    """[T, T] mask of the pairs of first and last token that are in order and span at most ``longest`` tokens."""
    return torch.ones(length, length, dtype=torch.bool).triu().tril(longest - 1)


def _tokens_of(answer: AnswerSpan, places: list[tuple[int, int] | None]) -> tuple[int, int]:
    """The first and the last token that cover an answer; (0, 0) where the part does not contain all of it."""
    covering = [i for i, place in enumerate(places) if place and place[0] < answer.end and place[1] > answer.start]
    if not covering:
        return 0, 0
    first, last = places[covering[0]], places[covering[-1]]
    assert first is not None
    assert last is not None
    return (covering[0], covering[-1]) if first[0] <= answer.start and last[1] >= answer.end else (0, 0)


def _answers(value: Any, column: str) -> Iterator[AnswerSpan]:
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
        yield AnswerSpan(text, start)


def _rows_of(columns: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Convert answers from SQuAD's object of two lists to a list of objects.

    Raises:
        DataError: the lists are missing, or not of the same length.
    """
    lists: list[Any] = [columns.get(name) for name in PARTS]
    if not all(isinstance(values, list) for values in lists) or len({len(values) for values in lists}) > 1:
        raise DataError(f"column {column!r} has the answers {columns!r}; give 'text' and 'answer_start' lists as long")
    return [dict(zip(PARTS, values, strict=True)) for values in zip(*lists, strict=True)]
