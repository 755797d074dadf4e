"""The task that a recipe's fields describe."""

from __future__ import annotations

from softtune.data import Template
from softtune.peft_types import TaskType
from softtune.tasks import KINDS, Task
from softtune.training.recipe_fields import RecipeFields


def check_task(recipe: RecipeFields) -> None:
    """Check that the fields that describe the task fit it.

    Raises:
        ValueError: they do not fit.
    """
    kind = _kind_of(recipe)
    if kind.has_template:
        _check_template_is_there(recipe)
    if recipe.task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) and not recipe.labels:
        raise ValueError(f"{recipe.task.value} needs labels: list them")
    kind.check_recipe(recipe)
    if recipe.choices and (recipe.labels or recipe.task is not TaskType.CAUSAL_LM):
        raise ValueError("choices are for a decoder that writes one: set task: CAUSAL_LM, and drop labels")
    if kind.has_template:
        _check_template(recipe, kind)


def _check_template_is_there(recipe: RecipeFields) -> None:
    for name in ("template", "label_column"):
        if name not in recipe.model_fields_set:
            raise ValueError(f"{name} is missing: add it, or messages")


def _check_template(recipe: RecipeFields, kind: type[Task]) -> None:
    template, example = Template(recipe.template), kind.bare_template
    if example and not _is_like(template, Template(example)):
        raise ValueError(f"{recipe.task.value} reads its columns as they are: write a template such as {example!r}")
    if not template.fields and not recipe.choices:
        raise ValueError("the template names no column, so that all records read alike: write one, such as {text}")
    if template.num_virtual_tokens and recipe.chat:
        raise ValueError("chat makes the template the user's turn, which has no places of virtual tokens: drop them")


def task_of(recipe: RecipeFields) -> Task:
    """Build the task that a recipe describes, for training and prediction."""
    return _kind_of(recipe).from_recipe(recipe)


def _kind_of(recipe: RecipeFields) -> type[Task]:
    return next(kind for kind in KINDS if kind.fits(recipe))


def _is_like(template: Template, example: Template) -> bool:
    """Whether a template has as many different fields, and nothing but spaces between them."""
    has_words = any(part.kind != "field" and part.value.strip() for part in template.parts)
    return len(template.fields) == len(example.fields) and not has_words
