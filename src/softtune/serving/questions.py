"""What adapters answer to records: labels, choices, tags, parts of a text.

Records are cut into tokens in threads of their own, since that may take long.
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
from softtune.serving.heads import Judging
from softtune.serving.jobs import Scoring
from softtune.serving.registry import Version
from softtune.serving.service import ASKED, Service

MOST_CHOICES = 64
"""Of one record."""
Result = TypeVar("Result")


class Questions:
    """Asks adapters about records.

    Args:
        service: what is served.
        note: told how many tokens an adapter of some name has read.
    """

    def __init__(self, service: Service, note: Callable[[str, int], None]) -> None:
        self._service = service
        self._note = note
        self._nothing_said: WeakKeyDictionary[Version, Tensor] = WeakKeyDictionary()
        """What labels have where nothing is said."""

    def record(self, version: Version, given: Any) -> dict[str, Any]:
        """A record by its columns, which may be given as the text of the only one.

        Raises:
            RequestError: the adapter reads several, or one is missing.
        """
        task = version.facts.task
        columns = () if task is None else task.columns
        if isinstance(given, str) and len(columns) == 1:
            return {columns[0]: given}
        if isinstance(given, str):
            raise RequestError(f"{version.name} reads {', '.join(columns) or 'no records'}: send an object with these")
        if unknown := sorted(given.keys() - {*columns}):
            raise RequestError(f"{version.name} does not read {unknown[0]!r}: it reads {', '.join(columns)}")
        return dict(given)

    async def label(self, version: Version, record: Mapping[str, Any]) -> tuple[dict[str, float], int]:
        """Each label's probability, or each choice's; and how many tokens of the record were cut.

        Raises:
            RequestError: the adapter has no labels for whole records.
            DataError: the record lacks a column, or does not fit.
            TooLongError, FullError, ClosedError: see ``Lane.submit``.
        """
        task = _checked(version, record, LabelTask, ChoiceTask)
        if isinstance(task, ChoiceTask):
            labels = task.of(record)
            if len(labels) > MOST_CHOICES:
                raise RequestError(f"the record has {len(labels)} choices: give {MOST_CHOICES} at most")
            examples = await self._encoded(lambda own: [task.encode(record, own, choice) for choice in labels])
            scores, cut = await self._score(version, examples), examples[0].truncated
        else:
            labels = task.verbalizer.labels
            scores, cut = await self._scores_of_labels(version, task, record)
            if task.is_calibrated and version not in self._nothing_said:
                self._nothing_said[version], _ = await self._scores_of_labels(version, task, task.nothing_said)
            scores = scores - self._nothing_said[version] if task.is_calibrated else scores
        return dict(zip(labels, scores.softmax(-1).tolist(), strict=True)), cut

    async def tag(self, version: Version, record: Mapping[str, Any]) -> tuple[list[str], int]:
        """The tag of each word, and how many tokens of them were cut. Raises as ``label`` does."""
        task = _checked(version, record, TagTask)
        example, firsts = await self._encoded(lambda own: task.prompt(record, own))
        [(logits,)] = await self._judge(version, [example])
        classes = logits.argmax(-1).tolist()
        return [OUTSIDE if first is None else task.labels[classes[first]] for first in firsts], example.truncated

    async def answer(self, version: Version, record: Mapping[str, Any]) -> tuple[int, int, str]:
        """The part of the text that answers the question: its first character, the one behind it, and what it reads; an
        empty one for none. Raises as ``label`` does."""
        task = _checked(version, record, SpanTask)
        parts = await self._encoded(lambda own: task.prompts(record, own))
        found = await self._judge(version, [part.example for part in parts])
        start, end = best_span(task, [(part, own[0], own[1]) for part, own in zip(parts, found, strict=True)])
        return start, end, record[task.context][start:end]

    async def _scores_of_labels(
        self, version: Version, task: LabelTask, record: Mapping[str, Any]
    ) -> tuple[Tensor, int]:
        if task.has_head:
            example = await self._encoded(lambda own: task.encode(record, own))
            [(logits,)] = await self._judge(version, [example])
            return logits, example.truncated
        labels = task.verbalizer.labels
        examples = await self._encoded(lambda own: [task.encode(record, own, label=label) for label in labels])
        return await self._score(version, examples), examples[0].truncated

    async def _encoded(self, encode: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        """What a function makes of a record, which would keep others waiting."""
        return await asyncio.to_thread(self._service.encoded, encode)

    async def _score(self, version: Version, examples: Sequence[Example]) -> Tensor:
        """[N] log-probabilities of the answers of examples that begin with the same text."""
        ids, labels = examples[0].input_ids, examples[0].labels
        count = next(number for number, label in enumerate(labels) if label != IGNORED)
        if not count:
            raise RequestError("the record has no words: write some")
        answers = [example.input_ids[count:] for example in examples]
        places = examples[0].prompt_positions
        scores = await self._service.told(
            self._service.engine, version, lambda tell: Scoring(ids[:count], answers, tell, places)
        )
        self._note(version.name, count + sum(len(answer) - 1 for answer in answers))
        return torch.tensor(scores)

    async def _judge(self, version: Version, examples: Sequence[Example]) -> list[tuple[Tensor, ...]]:
        """What the adapter's head says to examples."""
        found: list[tuple[Tensor, ...]]
        found = await self._service.told(version.facts.lane, version, lambda tell: Judging(examples, tell))
        self._note(version.name, sum(len(example.input_ids) for example in examples))
        return found


def _checked(version: Version, record: Mapping[str, Any], *kinds: type) -> Any:
    """The adapter's task, which a request may ask about this record."""
    task: Any = version.facts.task
    if type(task) not in kinds:
        raise RequestError(f"{version.name} was not trained for that: ask it for {ASKED[type(task)]}")
    if missing := [column for column in task.columns if column not in record]:
        raise RequestError(f"the record lacks {missing[0]!r}: {version.name} reads {', '.join(task.columns)}")
    return task
