"""The task that a recipe's fields describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.data import ChoiceTask, LabelTask, SpanTask, TagTask, Task, Template, TextTask, Verbalizer
from softtune.data.tagging import is_bio
from softtune.methods import TaskType

if TYPE_CHECKING:
    from softtune.training.recipe import Recipe

READ_AS_THEY_ARE = {TaskType.TOKEN_CLS: "{tokens}", TaskType.QUESTION_ANS: "{question} {context}"}
"""Example templates of tasks that take their columns without any text around them."""


def check_task(recipe: Recipe) -> None:
    """Check that the fields that describe the task fit it.

    Raises:
        ValueError: they do not fit.
    """
    kind, labels = recipe.task, recipe.labels
    if kind in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) and not labels:
        raise ValueError(f"{kind.value} needs labels: list them")
    if kind is TaskType.TOKEN_CLS and isinstance(labels, dict):
        raise ValueError("TOKEN_CLS has no words for its labels: list the tags")
    if kind is TaskType.TOKEN_CLS and (others := [tag for tag in labels or () if not is_bio(tag)]):
        raise ValueError(f"the label {others[0]!r} is no BIO tag: write O, and B- and I- before the kind of an entity")
    if kind is TaskType.QUESTION_ANS and labels:
        raise ValueError("QUESTION_ANS answers with parts of a text: drop labels")
    if recipe.choices and (labels or kind is not TaskType.CAUSAL_LM):
        raise ValueError("choices are for a decoder that writes one: set task: CAUSAL_LM, and drop labels")
    template, example = Template(recipe.template), READ_AS_THEY_ARE.get(kind)
    if example and not _is_like(template, Template(example)):
        raise ValueError(f"{kind.value} reads its columns as they are: write a template such as {example!r}")
    if not template.fields and not recipe.choices:
        raise ValueError("the template names no column, so that all records read alike: write one, such as {text}")


def task_of(recipe: Recipe) -> Task:
    """Build the task that a recipe describes, for training and prediction."""
    template, column, longest = Template(recipe.template), recipe.label_column, recipe.max_length
    if recipe.task is TaskType.TOKEN_CLS:
        [words] = template.fields
        return TagTask(words=words, label_column=column, labels=tuple(recipe.labels or ()), max_length=longest)
    if recipe.task is TaskType.QUESTION_ANS:
        question, context = template.fields
        return SpanTask(
            question=question,
            context=context,
            label_column=column,
            max_length=longest,
            stride=recipe.stride,
            may_be_unanswerable=recipe.unanswerable,
        )
    if recipe.choices is not None:
        return ChoiceTask(template=template, choices=recipe.choices, label_column=column, max_length=longest)
    if recipe.labels is None:
        return TextTask(
            kind=recipe.task,
            template=template,
            label_column=column,
            max_length=longest,
            max_new_tokens=recipe.max_new_tokens,
        )
    labels = recipe.labels
    return LabelTask(
        kind=recipe.task,
        template=template,
        label_column=column,
        verbalizer=Verbalizer(labels) if isinstance(labels, dict) else Verbalizer.from_labels(labels),
        max_length=longest,
        is_calibrated=recipe.calibrate,
    )


def _is_like(template: Template, example: Template) -> bool:
    """Whether a template has as many different fields as an example, and only spaces between them."""
    has_words = any(part.kind != "field" and part.value.strip() for part in template.parts)
    return len(template.fields) == len(example.fields) and not has_words
