"""Predictions for records of any kind of task, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune.data import IGNORED, ChoiceTask, Example, LabelTask, SpanTask, TagTask, Task, TextTask, each_row
from softtune.data.spans import Stride
from softtune.data.tagging import OUTSIDE
from softtune.errors import ConfigError
from softtune.evaluation.metrics import PERPLEXITY, Quality, label_quality, span_quality, tag_quality, text_quality
from softtune.evaluation.predict import Advance, score_head, score_spans, score_words, tag_words, unwatched, write_texts
from softtune.methods import TaskType
from softtune.model import PeftModel


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
        written = task.max_new_tokens if isinstance(task, TextTask) else 0
    if positions - virtual - written < 1:
        raise ConfigError(
            f"the model has {positions} positions, {virtual} virtual and {written} new tokens leave none for a text: "
            "lower num_virtual_tokens or max_new_tokens"
        )
    return _with_limits(task, positions - virtual - written)


def _with_limits(task: Any, limit: int, **limits: int) -> Task:
    limited: Task = replace(task, max_length=min(task.max_length, limit), **limits)
    return limited


@dataclass(frozen=True)
class _Request:
    """Records to predict, and the model to use."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    records: Dataset
    advance: Advance

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    records: Dataset,
    *,
    advance: Advance = unwatched,
) -> Answers:
    """Predict every record with a model and its adapter.

    Args:
        model: the model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        task: the task, which encodes the records.
        records: rows with the task's columns; labels are not needed.
        advance: called with the number of rows done.

    Raises:
        DataError: a column is missing, or a row does not fit.
        AdapterError: the model's outputs contain NaN.
    """
    model.eval()
    request = _Request(model, tokenizer, records, advance)
    match task:
        case LabelTask():
            return _labels(task, request)
        case TextTask():
            return _texts(task, request)
        case ChoiceTask():
            return _choices(task, request)
        case TagTask():
            return _tags(task, request)
        case SpanTask():
            return _spans(task, request)
    raise AssertionError(task)


def metric_names(task: Task) -> tuple[str, ...]:
    """Names of a task's metrics, the main one first."""
    match task:
        case TextTask():
            return ("bleu", "rouge_l", "chrf", "exact_match", PERPLEXITY)
        case TagTask():
            return ("f1", "precision", "recall", "accuracy")
        case SpanTask():
            return ("exact_match", "f1")
        case _:
            return ("accuracy", "balanced_accuracy", "macro_f1")


def judge(task: Task, records: Dataset, answers: Answers) -> Quality:
    """Compute the task's metrics for predictions of labelled records.

    Raises:
        DataError: a record has no label, or one that the task does not know.
    """
    references: list[Any] = each_row(records, [*task.columns, task.label_column], task.reference)
    match task:
        case TextTask():
            return text_quality(references, answers.texts, answers.likelihoods)
        case TagTask():
            return tag_quality(references, answers.texts)
        case SpanTask():
            return span_quality([[one.text for one in several] for several in references], answers.texts)
        case _:
            return label_quality(references, answers.texts)


def _labels(task: LabelTask, request: _Request) -> Answers:
    prompts = each_row(request.records, task.columns, lambda record: task.encode(record, request.tokenizer))
    labels = task.verbalizer.labels
    if task.has_head:
        scores = score_head(request.model, prompts, request.pad, advance=request.advance)
    else:
        records = [*request.records, task.nothing_said] if task.is_calibrated else request.records
        rows = [[task.encode(record, request.tokenizer, label=label) for label in labels] for record in records]
        scores = score_words(
            request.model, rows, request.pad, advance=lambda done: request.advance(min(done, len(prompts)))
        )
        if task.is_calibrated:
            scores = scores[:-1] - scores[-1]
    return Answers([labels[i] for i in scores.argmax(1)], scores, sum(p.truncated > 0 for p in prompts))


def _texts(task: TextTask, request: _Request) -> Answers:
    prompts = each_row(request.records, task.columns, lambda record: task.encode(record, request.tokenizer))
    options = {"do_sample": False, "max_new_tokens": task.max_new_tokens}
    texts = write_texts(request.model, request.tokenizer, prompts, advance=request.advance, **options)
    return Answers(texts, None, sum(p.truncated > 0 for p in prompts), _likelihoods(task, request))


def _likelihoods(task: TextTask, request: _Request) -> Tensor | None:
    """[B, 2] see ``Answers``. A reference is cut to about ``max_new_tokens`` tokens; its end-of-sequence token counts
    if nothing was cut."""
    column = task.label_column
    if column not in request.records.column_names or any(text in (None, "", []) for text in request.records[column]):
        return None
    is_apart = task.kind is TaskType.SEQ_2_SEQ_LM
    wide = task if is_apart else replace(task, max_length=task.max_length + task.max_new_tokens)
    first = [(record, task.reference(record)[0]) for record in request.records]
    rows = [_reference(wide, record, text, request.tokenizer, task.max_new_tokens) for record, text in first]
    scores = score_words(request.model, [[row] for row in rows], request.pad, batch_size=8)
    counts = torch.tensor([[float(sum(x != IGNORED for x in row.labels))] for row in rows])
    return torch.cat([scores, counts], dim=1)


def _reference(
    task: TextTask, record: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase, count: int
) -> Example:
    """A record encoded with a reference, which is cut to about ``count`` tokens."""
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(ends) < count:
        return task.encode(record, tokenizer, text=text)
    example = task.encode(record, tokenizer, text=text[: ends[max(count - 1, 1) - 1][1]])
    is_end = isinstance(example.labels, list) and example.labels[-1] == tokenizer.eos_token_id
    return replace(example, labels=[*example.labels[:-1], IGNORED]) if is_end else example


def _choices(task: ChoiceTask, request: _Request) -> Answers:
    choices = each_row(request.records, task.columns, task.choices_in)
    rows = each_row(
        request.records,
        task.columns,
        lambda record: [task.encode(record, request.tokenizer, choice) for choice in task.choices_in(record)],
    )
    scores = score_words(request.model, rows, request.pad, advance=request.advance)
    texts = [options[int(best)] for options, best in zip(choices, scores.argmax(1), strict=True)]
    return Answers(texts, None, sum(row[0].truncated > 0 for row in rows))


def _tags(task: TagTask, request: _Request) -> Answers:
    prompts = each_row(request.records, task.columns, lambda record: task.prompt(record, request.tokenizer))
    classes = tag_words(request.model, prompts, request.pad, advance=request.advance)
    tags = [tuple(OUTSIDE if i is None else task.labels[i] for i in row) for row in classes]
    return Answers(tags, None, sum(example.truncated > 0 for example, _ in prompts))


def _spans(task: SpanTask, request: _Request) -> Answers:
    parts = each_row(request.records, task.columns, lambda record: task.prompts(record, request.tokenizer))
    record_ids = [record for record, strides in enumerate(parts) for _ in strides]
    logits = score_spans(
        request.model,
        [part.example for strides in parts for part in strides],
        request.pad,
        advance=lambda done: request.advance(done * len(parts) // len(record_ids)),
    )
    every = iter(logits)
    found = [best_span(task, [(part, *next(every)) for part in strides]) for strides in parts]
    contexts = request.records[task.context]
    return Answers([text[start:end] for text, (start, end) in zip(contexts, found, strict=True)], None, 0)


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
