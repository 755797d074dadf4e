"""Records in, answers out, and how right they are, for any kind of task."""

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
    """What a model answers to some records."""

    texts: list[Any]
    """Each record's label, choice, part of a text or text, or a tuple with the tags of its words."""
    scores: Tensor | None
    """[B, N] log-probabilities of the labels; None where records have no labels in common."""
    truncated: int
    """How many records were cut to fit."""
    likelihoods: Tensor | None = None
    """[B, 2] the log-probability of each record's first reference, and how many tokens it has; None but for texts to
    write whose records all have one."""


def fitted(task: Task, model: PeftModel, *, written: int | None = None) -> Task:
    """The task with records cut to what the model can take beside the virtual tokens and a text to write.

    Args:
        task: how the records read.
        model: the model with its adapter.
        written: tokens to write after each record; by default those of the task.

    Raises:
        ConfigError: that leaves no position for a record.
    """
    virtual = max((getattr(own, "num_virtual_tokens", 0) for own in model.peft_config.values()), default=0)
    return fitted_beside(task, model.backbone.max_positions, virtual, written=written)


def fitted_beside(task: Task, positions: int | None, virtual: int, *, written: int | None = None) -> Task:
    """See ``fitted``; for a model of so many positions and an adapter of so many virtual tokens."""
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
class _Question:
    """Records to answer, and who is asked."""

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
    """Let a model with its adapter answer every record.

    Args:
        model: the model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        task: how the records read.
        records: rows with the task's columns; a label is not needed.
        advance: told how many rows are done.

    Raises:
        DataError: a column is missing, or a row does not fit.
        AdapterError: what the model says is no number.
    """
    model.eval()
    asked = _Question(model, tokenizer, records, advance)
    match task:
        case LabelTask():
            return _labels(task, asked)
        case TextTask():
            return _texts(task, asked)
        case ChoiceTask():
            return _choices(task, asked)
        case TagTask():
            return _tags(task, asked)
        case SpanTask():
            return _spans(task, asked)
    raise AssertionError(task)


def metric_names(task: Task) -> tuple[str, ...]:
    """What the answers to a task are measured by, the foremost first."""
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
    """What the answers to labelled records are worth, by the metrics that fit the task.

    Raises:
        DataError: a record has no label, or one that the task does not know.
    """
    right: list[Any] = each_row(records, [*task.columns, task.label_column], task.right)
    match task:
        case TextTask():
            return text_quality(right, answers.texts, answers.likelihoods)
        case TagTask():
            return tag_quality(right, answers.texts)
        case SpanTask():
            return span_quality([[one.text for one in several] for several in right], answers.texts)
        case _:
            return label_quality(right, answers.texts)


def _labels(task: LabelTask, asked: _Question) -> Answers:
    prompts = each_row(asked.records, task.columns, lambda record: task.encode(record, asked.tokenizer))
    labels = task.verbalizer.labels
    if task.has_head:
        scores = score_head(asked.model, prompts, asked.pad, advance=asked.advance)
    else:
        records = [*asked.records, task.nothing_said] if task.is_calibrated else asked.records
        rows = [[task.encode(record, asked.tokenizer, label=label) for label in labels] for record in records]
        scores = score_words(asked.model, rows, asked.pad, advance=lambda done: asked.advance(min(done, len(prompts))))
        if task.is_calibrated:
            scores = scores[:-1] - scores[-1]
    return Answers([labels[i] for i in scores.argmax(1)], scores, sum(p.truncated > 0 for p in prompts))


def _texts(task: TextTask, asked: _Question) -> Answers:
    prompts = each_row(asked.records, task.columns, lambda record: task.encode(record, asked.tokenizer))
    options = {"do_sample": False, "max_new_tokens": task.max_new_tokens}
    texts = write_texts(asked.model, asked.tokenizer, prompts, advance=asked.advance, **options)
    return Answers(texts, None, sum(p.truncated > 0 for p in prompts), _likelihoods(task, asked))


def _likelihoods(task: TextTask, asked: _Question) -> Tensor | None:
    """[B, 2] see ``Answers``. Of a reference count as many tokens as the model may write, and its end where it is one
    of them."""
    column = task.label_column
    if column not in asked.records.column_names or any(text in (None, "", []) for text in asked.records[column]):
        return None
    is_apart = task.kind is TaskType.SEQ_2_SEQ_LM
    wide = task if is_apart else replace(task, max_length=task.max_length + task.max_new_tokens)
    first = [(record, task.right(record)[0]) for record in asked.records]
    rows = [_reference(wide, record, text, asked.tokenizer, task.max_new_tokens) for record, text in first]
    scores = score_words(asked.model, [[row] for row in rows], asked.pad, batch_size=8)
    counts = torch.tensor([[float(sum(x != IGNORED for x in row.labels))] for row in rows])
    return torch.cat([scores, counts], dim=1)


def _reference(
    task: TextTask, record: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase, count: int
) -> Example:
    """A record with the first tokens of a reference."""
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(ends) < count:
        return task.encode(record, tokenizer, text=text)
    own = task.encode(record, tokenizer, text=text[: ends[max(count - 1, 1) - 1][1]])
    is_end = isinstance(own.labels, list) and own.labels[-1] == tokenizer.eos_token_id
    return replace(own, labels=[*own.labels[:-1], IGNORED]) if is_end else own


def _choices(task: ChoiceTask, asked: _Question) -> Answers:
    choices = each_row(asked.records, task.columns, task.of)
    rows = each_row(
        asked.records,
        task.columns,
        lambda record: [task.encode(record, asked.tokenizer, choice) for choice in task.of(record)],
    )
    scores = score_words(asked.model, rows, asked.pad, advance=asked.advance)
    texts = [own[int(best)] for own, best in zip(choices, scores.argmax(1), strict=True)]
    return Answers(texts, None, sum(row[0].truncated > 0 for row in rows))


def _tags(task: TagTask, asked: _Question) -> Answers:
    prompts = each_row(asked.records, task.columns, lambda record: task.prompt(record, asked.tokenizer))
    classes = tag_words(asked.model, prompts, asked.pad, advance=asked.advance)
    tags = [tuple(OUTSIDE if i is None else task.labels[i] for i in row) for row in classes]
    return Answers(tags, None, sum(example.truncated > 0 for example, _ in prompts))


def _spans(task: SpanTask, asked: _Question) -> Answers:
    parts = each_row(asked.records, task.columns, lambda record: task.prompts(record, asked.tokenizer))
    owners = [record for record, own in enumerate(parts) for _ in own]
    logits = score_spans(
        asked.model,
        [part.example for own in parts for part in own],
        asked.pad,
        advance=lambda done: asked.advance(done * len(parts) // len(owners)),
    )
    every = iter(logits)
    found = [best_span(task, [(part, *next(every)) for part in own]) for own in parts]
    contexts = asked.records[task.context]
    return Answers([text[start:end] for text, (start, end) in zip(contexts, found, strict=True)], None, 0)


def best_span(task: SpanTask, parts: Sequence[tuple[Stride, Tensor, Tensor]]) -> tuple[int, int]:
    """The characters of the likeliest answer in any part of a context; (0, 0) where no answer is likelier in all of
    them, if the task knows questions without one (Devlin et al. 2019, section 4.3)."""
    best, place = -torch.inf, (0, 0)
    for part, first, last in parts:
        own = torch.tensor([covered is not None for covered in part.places])
        pairs = torch.full((len(own), len(own)), -torch.inf).masked_fill(own[:, None] & own, 0)
        pairs = (pairs + first[:, None] + last).triu().masked_fill(~_short(len(own), task.max_answer), -torch.inf)
        score, index = float(pairs.max()), int(pairs.argmax())
        start, end = part.places[index // len(own)], part.places[index % len(own)]
        if score > best and start is not None and end is not None:
            best, place = score, (start[0], end[1])
    nothing = min(float(first[0] + last[0]) for _, first, last in parts)
    return (0, 0) if task.may_be_unanswerable and nothing > best else place


def _short(length: int, longest: int) -> Tensor:
    """[T, T] which pairs of first and last tokens are in order, and not too far apart."""
    return torch.ones(length, length, dtype=torch.bool).triu().tril(longest - 1)
