"""Requests that send records to adapters: for labels, choices, tags, or spans of a text.

Records are tokenized in threads of their own, since that may take long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune.data import IGNORED, ChoiceTask, Example, LabelTask, SpanTask, TagTask
from softtune.data.tagging import OUTSIDE
from softtune.errors import RequestError
from softtune.evaluation.answers import best_span
from softtune.serving.head_engine import HeadRequest
from softtune.serving.registry import Version
from softtune.serving.requests import LoglikelihoodRequest
from softtune.serving.service import ASKED, Service

MOST_CHOICES = 64
"""Maximum number of choices in one record."""
Result = TypeVar("Result")


class TaskRunner:
    """Runs adapters on records, by their task.

    Args:
        service: the service.
        note: called with an adapter's name and the number of tokens that it has read.
    """

    def __init__(self, service: Service, note: Callable[[str, int], None]) -> None:
        self._service = service
        self._note = note
        self._nothing_said: WeakKeyDictionary[Version, Tensor] = WeakKeyDictionary()
        """Each label's score for a record without content, of calibrated adapters (Zhao et al. 2021)."""

    def record(self, version: Version, given: Any) -> dict[str, Any]:
        """A record by its columns; a plain text is the value of the only column.

        Raises:
            RequestError: a text is given where the adapter reads several columns, or a column is unknown.
        """
        task = version.info.task
        columns = () if task is None else task.columns
        if isinstance(given, str) and len(columns) == 1:
            return {columns[0]: given}
        if isinstance(given, str):
            raise RequestError(f"{version.name} reads {', '.join(columns) or 'no records'}: send an object with these")
        if unknown := sorted(given.keys() - {*columns}):
            raise RequestError(f"{version.name} does not read {unknown[0]!r}: it reads {', '.join(columns)}")
        return dict(given)

    async def label(self, version: Version, record: Mapping[str, Any]) -> tuple[dict[str, float], int]:
        """Each label's or each choice's probability, and the number of truncated tokens.

        Raises:
            RequestError: the adapter has no labels for whole records, or the record lacks a column.
            DataError: the record does not fit.
            TooLongError, FullError, ClosedError: see ``Engine.submit``.
        """
        task = _checked(version, record, LabelTask, ChoiceTask)
        if isinstance(task, ChoiceTask):
            labels = task.choices_in(record)
            if len(labels) > MOST_CHOICES:
                raise RequestError(f"the record has {len(labels)} choices: give {MOST_CHOICES} at most")
            examples = await self._encoded(
                lambda tokenizer: [task.encode(record, tokenizer, choice) for choice in labels]
            )
            scores, cut = await self._score(version, examples), examples[0].truncated
        else:
            labels = task.verbalizer.labels
            scores, cut = await self._scores_of_labels(version, task, record)
            if task.is_calibrated and version not in self._nothing_said:
                self._nothing_said[version], _ = await self._scores_of_labels(version, task, task.nothing_said)
            scores = scores - self._nothing_said[version] if task.is_calibrated else scores
        return dict(zip(labels, scores.softmax(-1).tolist(), strict=True)), cut

    async def tag(self, version: Version, record: Mapping[str, Any]) -> tuple[list[str], int]:
        """The tag of each word, and the number of truncated tokens.

        Raises:
            RequestError: the adapter has no tags, or the record lacks a column.
            DataError, TooLongError, FullError, ClosedError: see ``label``.
        """
        task = _checked(version, record, TagTask)
        example, firsts = await self._encoded(lambda tokenizer: task.prompt(record, tokenizer))
        [(logits,)] = await self._judge(version, [example])
        classes = logits.argmax(-1).tolist()
        return [OUTSIDE if first is None else task.labels[classes[first]] for first in firsts], example.truncated

    async def answer(self, version: Version, record: Mapping[str, Any]) -> tuple[int, int, str]:
        """The span of the text that answers the question: its start, its end (exclusive) in characters, and its text.

        A question without an answer has an empty span.

        Raises:
            RequestError: the adapter answers no questions, or the record lacks a column.
            DataError, TooLongError, FullError, ClosedError: see ``label``.
        """
        task = _checked(version, record, SpanTask)
        parts = await self._encoded(lambda tokenizer: task.prompts(record, tokenizer))
        outputs = await self._judge(version, [part.example for part in parts])
        start, end = best_span(
            task, [(part, logits[0], logits[1]) for part, logits in zip(parts, outputs, strict=True)]
        )
        return start, end, record[task.context][start:end]

    async def _scores_of_labels(
        self, version: Version, task: LabelTask, record: Mapping[str, Any]
    ) -> tuple[Tensor, int]:
        if task.has_head:
            example = await self._encoded(lambda tokenizer: task.encode(record, tokenizer))
            [(logits,)] = await self._judge(version, [example])
            return logits, example.truncated
        labels = task.verbalizer.labels
        examples = await self._encoded(
            lambda tokenizer: [task.encode(record, tokenizer, label=label) for label in labels]
        )
        return await self._score(version, examples), examples[0].truncated

    async def _encoded(self, encode: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        """Tokenize a record in a thread, so that the event loop is not blocked."""
        return await asyncio.to_thread(self._service.with_tokenizer, encode)

    async def _score(self, version: Version, examples: Sequence[Example]) -> Tensor:
        """[N] log-probabilities of the answers of N examples that begin with the same text."""
        ids, labels = examples[0].input_ids, examples[0].labels
        count = next(number for number, label in enumerate(labels) if label != IGNORED)
        if not count:
            raise RequestError("the record has no words: write some")
        answers = [example.input_ids[count:] for example in examples]
        places = examples[0].prompt_positions
        scores = await self._service.result_of(
            self._service.engine, version, lambda tell: LoglikelihoodRequest(ids[:count], answers, tell, places)
        )
        self._note(version.name, count + sum(len(answer) - 1 for answer in answers))
        return torch.tensor(scores)

    async def _judge(self, version: Version, examples: Sequence[Example]) -> list[tuple[Tensor, ...]]:
        """The outputs of the adapter's head for each example."""
        outputs: list[tuple[Tensor, ...]]
        outputs = await self._service.result_of(version.info.engine, version, lambda tell: HeadRequest(examples, tell))
        self._note(version.name, sum(len(example.input_ids) for example in examples))
        return outputs


def _checked(version: Version, record: Mapping[str, Any], *kinds: type) -> Any:
    """The adapter's task, if it is one of ``kinds`` and the record has its columns."""
    task: Any = version.info.task
    if type(task) not in kinds:
        raise RequestError(f"{version.name} was not trained for that: ask it for {ASKED[type(task)]}")
    if missing := [column for column in task.columns if column not in record]:
        raise RequestError(f"the record lacks {missing[0]!r}: {version.name} reads {', '.join(task.columns)}")
    return task
