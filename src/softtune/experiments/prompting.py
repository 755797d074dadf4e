"""Zero-shot and few-shot prompting of the base model: nothing is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softtune.data import Template
from softtune.errors import ConfigError, DataError, UnsupportedModelError
from softtune.evaluation.answers import fitted
from softtune.experiments.answering import metrics_of
from softtune.experiments.cases import PROMPTS, Case
from softtune.experiments.outcomes import Outcome
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.tasks import Task
from softtune.training.progress import Progress
from softtune.training.recipe import Recipe
from softtune.training.setup import Rows

END = "\n\n"
"""Separator after each row in front of a record, and so the end of generated text."""


def answer_alone(case: Case, progress: Progress) -> list[Outcome]:
    """Evaluate the base model with some training rows (shots) in front of each record. Without shots, all seeds give
    the same result, so only one runs.

    Raises:
        ConfigError: there are fewer training rows than shots.
        DataError: a record does not fit the model.
        UnsupportedModelError: the task has a head, or the shots leave a record no room.
    """
    shots, recipe = PROMPTS[case.entry], case.recipe
    if shots and not recipe.definition.has_template:
        raise UnsupportedModelError("conversations have no template that rows could stand in", "leave this entry out")
    if recipe.task.has_head:
        raise UnsupportedModelError("a head that is not trained answers nothing", "leave this entry out")
    base, tokenizer = load_base_model(
        recipe.model, recipe.task, num_labels=recipe.num_labels, options=recipe.load_options
    )
    model, rows = PeftModel(base), Rows.load(recipe)
    if shots > len(rows.training):
        raise ConfigError(
            f"{shots} rows stand in front of a record, there are {len(rows.training)}", "leave this entry out"
        )
    total = sum(p.numel() for p in base.parameters())
    found = []
    for run in case.runs if shots else case.runs[:1]:
        task = _with_shots(recipe, rows.training.shuffle(seed=run.seed).select(range(shots)), tokenizer)
        try:
            with model.disable_adapter():
                metrics = metrics_of(model, tokenizer, fitted(task, model), rows, progress, end=END if shots else None)
        except DataError as error:
            if not shots:
                raise
            reason = f"{shots} rows in front of a record leave it no room ({error}): leave this entry out"
            raise UnsupportedModelError(reason) from error
        found.append(
            Outcome(
                metrics=metrics,
                trained=0,
                total=total,
                stored=0,
                seconds=0,
                memory=0,
                steps=0,
                training_rows=shots,
                evaluation_rows=len(rows.evaluation or ()),
            )
        )
    return found


def _with_shots(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The recipe's task with labelled rows in front of the template."""
    if not len(rows):
        return recipe.definition
    task: Any = recipe.definition
    shots = "".join(f"{task.template.filled(row)}{task.answer_text(row)}{END}" for row in rows)
    more = len(tokenizer(shots)["input_ids"])
    template = Template(shots.replace("{", "{{").replace("}", "}}") + task.template.text)
    shown: Task = dataclasses.replace(task, template=template, max_length=task.max_length + more)
    return shown
