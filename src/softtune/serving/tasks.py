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

from softtune.data import Example
from softtune.data.encoding import IGNORED
from softtune.errors import RequestError
from softtune.serving.head_engine import HeadRequest
from softtune.serving.registry import Version
from softtune.serving.requests import LoglikelihoodRequest
from softtune.serving.service import Service, asks_for
from softtune.tasks import Task
from softtune.tasks.requests import Classify, ClassifyTokens, Generate, LocateSpan, Loglikelihood, Request

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
        self._baselines: WeakKeyDictionary[Version, list[Any]] = WeakKeyDictionary()
        """The results of the baseline record, of adapters whose task has one."""

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
            raise RequestError(
                f"{version.name} reads {', '.join(columns) or 'no records'}", "send an object with these"
            )
        if unknown := sorted(given.keys() - {*columns}):
            raise RequestError(
                f"{version.name} does not read {unknown[0]!r}", f"it reads {', '.join(columns) or 'no records'}"
            )
        return dict(given)

    async def run(self, endpoint: str, version: Version, record: Mapping[str, Any]) -> dict[str, Any]:
        """An adapter's prediction for a record, as JSON.

        Raises:
            RequestError: it is the wrong endpoint, or the record lacks a column, has too many choices or no text.
            DataError: the record does not fit.
            TooLongError, FullError, ClosedError: see ``Engine.submit``.
        """
        task = version.info.task
        if task is None or task.endpoint != endpoint:
            raise RequestError(f"{version.name} was not trained for that", f"ask it for {asks_for(task)}")
        if missing := [column for column in task.columns if column not in record]:
            raise RequestError(f"the record lacks {missing[0]!r}", f"{version.name} reads {', '.join(task.columns)}")
        if (choices := task.num_choices(record)) > MOST_CHOICES:
            raise RequestError(f"the record has {choices} choices", f"give {MOST_CHOICES} at most")
        requests, results = await self._execute(version, task, record)
        if task.baseline_record is not None and version not in self._baselines:
            _, self._baselines[version] = await self._execute(version, task, task.baseline_record)
        return task.as_json(task.process(record, requests, results, self._baselines.get(version)))

    async def _execute(
        self, version: Version, task: Task, record: Mapping[str, Any]
    ) -> tuple[Sequence[Request], list[Any]]:
        """A record's requests, and the result of each."""
        requests = await self._encoded(lambda tokenizer: task.requests(record, tokenizer))
        results: dict[Request, Any] = {}
        by_head = [request for request in requests if isinstance(request, Classify | ClassifyTokens | LocateSpan)]
        for request in requests:
            if isinstance(request, Loglikelihood):
                results[request] = await self._score(version, request)
            elif isinstance(request, Generate):
                raise RequestError(f"{version.name} generates texts", "ask for them at /v1/completions")
        if by_head:
            outputs = await self._judge(version, [request.example for request in by_head])
            for request, output in zip(by_head, outputs, strict=True):
                results[request] = output if isinstance(request, LocateSpan) else output[0]
        return requests, [results[request] for request in requests]

    async def _encoded(self, encode: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        """Tokenize a record in a thread, so that the event loop is not blocked."""
        return await asyncio.to_thread(self._service.with_tokenizer, encode)

    async def _score(self, version: Version, request: Loglikelihood) -> Tensor:
        """[N] log-probabilities of the answers of N examples that begin with the same text."""
        examples = request.examples
        ids, labels = examples[0].input_ids, examples[0].labels
        count = next(number for number, label in enumerate(labels) if label != IGNORED)
        if not count:
            raise RequestError("the record has no words", "write some")
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
