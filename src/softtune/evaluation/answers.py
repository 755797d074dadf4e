"""Records in, answers out, and how right they are, for any kind of task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune.data import Task, each_row
from softtune.errors import AdapterError, ConfigError
from softtune.evaluation.metrics import Quality, label_quality, text_quality
from softtune.evaluation.predict import Advance, score_head, score_words, unwatched, write_texts
from softtune.model import PeftModel


@dataclass(frozen=True)
class Answers:
    """What a model answers to some records."""

    texts: list[str]
    """Each record's likeliest label, or the text written for it."""
    scores: Tensor | None
    """[B, N] log-probabilities of the labels; None for free text."""
    truncated: int
    """How many records were cut to fit."""


def fitted(task: Task, model: PeftModel, *, written: int | None = None) -> Task:
    """The task with records cut to what the model can take beside the virtual tokens and a text to write.

    Args:
        task: how the records read.
        model: the model with its adapter.
        written: tokens to write after each record; by default the task's own, where it has no labels to choose from.

    Raises:
        ConfigError: that leaves no position for a record.
    """
    limit = model.backbone.max_positions
    if limit is None:
        return task
    virtual = getattr(model.active_peft_config, "num_virtual_tokens", 0)
    if model.backbone.is_encoder_decoder:
        return replace(task, max_length=min(task.max_length, limit - virtual), max_answer=limit - virtual)
    if written is None:
        written = 0 if task.verbalizer else task.max_new_tokens
    left = limit - virtual - written
    if left < 1:
        raise ConfigError(
            f"the model has {limit} positions, {virtual} virtual and {written} new tokens leave none for a text: "
            "lower num_virtual_tokens or max_new_tokens"
        )
    return replace(task, max_length=min(task.max_length, left))


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
        records: rows with the template's columns; a label is not needed.
        advance: told how many rows are done.

    Raises:
        DataError: a column is missing, or a row does not fit.
        AdapterError: the scores are no numbers.
    """
    model.eval()
    pad = int(tokenizer.pad_token_id)
    prompts = each_row(records, task.template.fields, lambda record: task.encode(record, tokenizer))
    truncated = sum(prompt.truncated > 0 for prompt in prompts)
    if task.verbalizer is None:
        options = {"do_sample": False, "max_new_tokens": task.max_new_tokens}
        return Answers(write_texts(model, tokenizer, prompts, advance=advance, **options), None, truncated)
    if task.has_head:
        scores = score_head(model, prompts, pad, advance=advance)
    else:
        rows = [[task.encode(r, tokenizer, label=label) for label in task.verbalizer.labels] for r in records]
        scores = score_words(model, rows, pad, advance=advance)
    if not bool(scores.isfinite().all()):
        raise AdapterError("the scores are no numbers, as after a training that blew up: train anew at a lower rate")
    return Answers([task.verbalizer.labels[i] for i in scores.argmax(1)], scores, truncated)


def measure(task: Task, records: Dataset, answers: Answers) -> dict[str, float]:
    """How right the answers to labelled records are, by the metrics that fit the task: those of labels, or of texts.

    Raises:
        DataError: a record has no label, or one that the task does not know.
    """
    return judge(task, records, answers).metrics


def judge(task: Task, records: Dataset, answers: Answers) -> Quality:
    """What the answers to labelled records are worth; see ``measure``."""
    right = each_row(records, [task.label_column], task.label_of)
    if task.verbalizer is None:
        return text_quality([[text] for text in right], answers.texts)
    return label_quality(right, answers.texts)
