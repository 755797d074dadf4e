"""Evaluates a model on the held-out rows of a recipe."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from softtune.errors import AdapterError, TrainingError
from softtune.evaluation.answers import answer, judge
from softtune.model import PeftModel
from softtune.tasks import Task
from softtune.training.progress import EVALUATING, Progress
from softtune.training.setup import Rows


def metrics_of(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Rows,
    progress: Progress,
    *,
    end: str | None = None,
) -> dict[str, float]:
    """The task's metrics on the evaluation rows. Generated texts are cut before ``end``.

    Raises:
        DataError: a row does not fit, or has an unknown label.
        TrainingError: the model's outputs contain NaN.
    """
    held_out = rows.evaluation
    assert held_out is not None

    def advance(done: int) -> None:
        progress(EVALUATING, done, len(held_out), "")

    try:
        answers = answer(model, tokenizer, task, held_out, advance=advance)
    except AdapterError as error:
        raise TrainingError(error.what, error.remedy) from error
    if end is not None and task.num_new_tokens:
        answers = replace(answers, texts=[text.partition(end)[0].strip() for text in answers.texts])
    return judge(task, held_out, answers).metrics
