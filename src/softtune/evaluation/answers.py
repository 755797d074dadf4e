"""Predictions for records of any kind of task, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune.data.encoding import IGNORED, NO_TOKENS
from softtune.data.records import each_row
from softtune.errors import ConfigError, DataError
from softtune.evaluation.predict import (
    Advance,
    score_head,
    score_spans,
    score_tokens,
    score_words,
    unwatched,
    write_texts,
)
from softtune.model import PeftModel
from softtune.peft_types import TaskType
from softtune.tasks import Prediction, Task
from softtune.tasks.metrics import Quality
from softtune.tasks.requests import (
    Classify,
    ClassifyTokens,
    Generate,
    LocateSpan,
    Loglikelihood,
    Request,
    with_prefix_mask,
)


@dataclass(frozen=True)
class Answers:
    """A model's predictions for a data set of B records."""

    texts: list[Any]
    """One per record: its label, its choice, a span of its text, a generated text, or a tuple with a tag per word."""
    scores: Tensor | None
    """[B, N] log-probabilities of the labels; None where the records have no common set of labels."""
    truncated: int
    """Number of records that were truncated."""
    likelihoods: Tensor | None = None
    """[B, 2] log-probability and number of tokens of each record's first reference; None unless the task is text
    generation and all records have a reference."""

    @classmethod
    def from_predictions(cls, predictions: Sequence[Prediction], task: Task, likelihoods: Tensor | None) -> Answers:
        """The predictions of every record, in order."""
        scores = [p.scores for p in predictions if p.scores is not None]
        is_scored = bool(task.label_set) and len(scores) == len(predictions)
        none = torch.zeros(0, len(task.label_set))
        return cls(
            texts=[p.answer for p in predictions],
            scores=torch.cat([none, *(own[None] for own in scores)]) if is_scored else None,
            truncated=sum(p.truncated > 0 for p in predictions),
            likelihoods=likelihoods,
        )

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """The predictions for a data set of whose rows each part has predicted the next ones."""
        parts = [part for part in parts if part.texts] or [*parts[:1]]
        scores = [part.scores for part in parts if part.scores is not None]
        likelihoods = [part.likelihoods for part in parts if part.likelihoods is not None]
        return cls(
            texts=[text for part in parts for text in part.texts],
            scores=torch.cat(scores) if len(scores) == len(parts) else None,
            truncated=sum(part.truncated for part in parts),
            likelihoods=torch.cat(likelihoods) if len(likelihoods) == len(parts) else None,
        )


def fitted(task: Task, model: PeftModel, *, written: int | None = None) -> Task:
    """The task with a maximum length that leaves the model room for the virtual tokens and the new tokens.

    Args:
        task: the task, which encodes the records.
        model: the model with its adapter.
        written: tokens to generate after each record; by default those of the task.

    Raises:
        ConfigError: no position is left for a record.
    """
    virtual = max((getattr(config, "num_virtual_tokens", 0) for config in model.peft_config.values()), default=0)
    return fitted_beside(task, model.backbone.max_positions, virtual, written=written)


def fitted_beside(task: Task, positions: int | None, virtual: int, *, written: int | None = None) -> Task:
    """Like ``fitted``, for a model with ``positions`` positions and an adapter with ``virtual`` virtual tokens.

    Raises:
        ConfigError: no position is left for a record.
    """
    if positions is None:
        return task
    if task.kind is TaskType.SEQ_2_SEQ_LM:
        return _with_limits(task, positions - virtual, max_answer=positions - virtual)
    if written is None:
        written = task.num_new_tokens
    if positions - virtual - written < 1:
        raise ConfigError(
            f"the model has {positions} positions, {virtual} virtual and {written} new tokens leave none for a text",
            "lower num_virtual_tokens or max_new_tokens",
        )
    return _with_limits(task, positions - virtual - written)


def _with_limits(task: Any, limit: int, **limits: int) -> Task:
    limited: Task = replace(task, max_length=min(task.max_length, limit), **limits)
    return limited


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    records: Dataset,
    *,
    prefix_masks: Sequence[list[int] | None] | None = None,
    advance: Advance = unwatched,
) -> Answers:
    """Predict every record with a model and its adapter.

    Args:
        model: the model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        task: the task, which encodes the records.
        records: rows with the task's columns; labels are not needed.
        prefix_masks: for each record the virtual tokens of the prefix that it sees; by default all.
        advance: called with the number of rows done.

    Raises:
        DataError: a column is missing, or a row does not fit.
        AdapterError: the model's outputs contain NaN.
    """
    model.eval()
    requests = each_row(records, task.columns, lambda record: _requests(task, record, tokenizer))
    if prefix_masks is not None:
        pairs = zip(requests, prefix_masks, strict=True)
        requests = [[with_prefix_mask(request, mask) for request in own] for own, mask in pairs]
    every = [*requests, *([] if (extra := task.baseline_record) is None else [task.requests(extra, tokenizer)])]
    flat = [request for own in every for request in own]
    count = sum(map(len, requests))
    results = iter(
        execute(model, tokenizer, flat, advance=lambda done: advance(min(done, count) * len(records) // max(count, 1)))
    )
    grouped = [[next(results) for _ in own] for own in every]
    baseline = None if extra is None else grouped.pop()
    rows = zip(records, requests, grouped, strict=True)
    predictions = [task.process(record, own, found, baseline) for record, own, found in rows]
    return Answers.from_predictions(predictions, task, _likelihoods(model, tokenizer, task, records))


def _requests(task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sequence[Request]:
    """A record's requests.

    Raises:
        DataError: the record does not fit, or it has no tokens that an answer could follow.
    """
    requests = task.requests(record, tokenizer)
    if task.kind is TaskType.CAUSAL_LM:
        starts = [request.example.labels for request in requests if isinstance(request, Loglikelihood)]
        if any(isinstance(labels, list) and labels[0] != IGNORED for labels in starts):
            raise DataError(NO_TOKENS)
    return requests


def execute(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], *, advance: Advance = unwatched
) -> list[Any]:
    """Execute requests, those of a kind in batches.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        requests: what to request of it.
        advance: called with the number of requests done.

    Returns:
        The result of each request, as its class says.

    Raises:
        AdapterError: a result is NaN.
    """
    results: dict[int, Any] = {}
    for kind, run in EXECUTORS.items():
        numbers = [number for number, request in enumerate(requests) if isinstance(request, kind)]
        if numbers:
            before = len(results)
            found = run(model, tokenizer, [requests[n] for n in numbers], partial(_after, advance, before))
            results |= zip(numbers, found, strict=True)
    return [results[number] for number in range(len(requests))]


def _after(advance: Advance, before: int, done: int) -> None:
    advance(before + done)


def _loglikelihoods(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Any], advance: Advance
) -> list[Tensor]:
    rows = [request.examples for request in requests]
    scores = score_words(model, rows, int(tokenizer.pad_token_id), advance=advance)
    return [own[: len(row)] for own, row in zip(scores, rows, strict=True)]


def _texts(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Any], advance: Advance
) -> list[str]:
    texts: dict[int, str] = {}
    for length in dict.fromkeys(request.max_new_tokens for request in requests):
        numbers = [number for number, request in enumerate(requests) if request.max_new_tokens == length]
        prompts, done = [requests[number].example for number in numbers], partial(_after, advance, len(texts))
        found = write_texts(model, tokenizer, prompts, advance=done, do_sample=False, max_new_tokens=length)
        texts |= zip(numbers, found, strict=True)
    return [texts[number] for number in range(len(requests))]


def _by_head(score: Callable[..., Iterable[Any]]) -> Executor:
    def run(
        model: PeftModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Any], advance: Advance
    ) -> list[Any]:
        examples = [request.example for request in requests]
        return [*score(model, examples, int(tokenizer.pad_token_id), advance=advance)]

    return run


Executor = Callable[[PeftModel, PreTrainedTokenizerBase, Sequence[Any], Advance], Sequence[Any]]
EXECUTORS: dict[type[Any], Executor] = {
    Loglikelihood: _loglikelihoods,
    Generate: _texts,
    Classify: _by_head(score_head),
    ClassifyTokens: _by_head(score_tokens),
    LocateSpan: _by_head(score_spans),
}
"""What executes each kind of request."""


def judge(task: Task, records: Dataset, answers: Answers) -> Quality:
    """The metrics of the answers to labelled records.

    Raises:
        DataError: a record has no label, or one that the task does not know.
    """
    references: list[Any] = each_row(records, [*task.columns, task.label_column], task.reference)
    return task.measure(references, answers.texts, answers.likelihoods)


def _likelihoods(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, records: Dataset) -> Tensor | None:
    """[B, 2] see ``Answers``."""
    if not task.num_new_tokens or not task.has_references(records):
        return None
    if any(text in (None, "", []) for text in records[task.label_column]):
        return None
    requests = [task.reference_request(record, tokenizer) for record in records]
    rows = [request.examples for request in requests if request is not None]
    if not rows:
        return None
    scores = score_words(model, rows, int(tokenizer.pad_token_id), batch_size=8)
    counts = torch.tensor([[float(sum(x != IGNORED for x in row[0].labels))] for row in rows])
    return torch.cat([scores, counts], dim=1)
