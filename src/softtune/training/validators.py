"""Validates fields of a recipe that have an effect only together with others."""

from __future__ import annotations

from collections.abc import Callable

from softtune.peft_types import TaskType
from softtune.training.recipe_fields import RecipeFields


def _writes_texts(recipe: RecipeFields) -> bool:
    return not (recipe.labels or recipe.choices or recipe.task.has_head)


def _may_validate(recipe: RecipeFields) -> bool:
    """Whether a recipe is validated, or names patience: null too, since a run without it drops no other field."""
    return recipe.is_validated or "patience" in recipe.model_fields_set


NEEDS: dict[str, tuple[Callable[[RecipeFields], bool], str]] = {
    "shares": (lambda r: r.examples is not None, "needs examples: say how many rows to sample"),
    "test_size": (
        lambda r: r.evaluation is None,
        "holds rows out where there is no evaluation data: drop one of the two",
    ),
    "evaluation_split": (lambda r: r.evaluation is not None, "needs evaluation: name the data set there too"),
    "evaluation_examples": (
        lambda r: r.evaluation is not None or bool(r.test_size),
        "needs rows to evaluate on: set evaluation or test_size",
    ),
    "validation_size": (
        _may_validate,
        "holds rows out for patience: set patience, or drop it",
    ),
    "metric_for_best_model": (_may_validate, "chooses a checkpoint by held-out rows: set patience or eval_steps"),
    "label_smoothing_factor": (
        lambda r: r.task is not TaskType.QUESTION_ANS,
        "is for labels and tokens, and not for parts of a text: drop it",
    ),
    "calibrate": (
        lambda r: bool(r.labels) and not r.task.has_head,
        "is for labels that a language model writes: list labels, or drop it",
    ),
    "hub_model_id": (lambda r: r.push_to_hub, "names what push_to_hub uploads to: set it too, or drop this"),
    "hub_private_repo": (lambda r: r.push_to_hub, "is for what push_to_hub uploads to: set it too, or drop this"),
    "chat": (
        lambda r: r.task is TaskType.CAUSAL_LM and r.messages is None,
        "is for a template whose answer a decoder writes: set task: CAUSAL_LM, and drop messages, or drop chat",
    ),
    "messages": (lambda r: r.task is TaskType.CAUSAL_LM, "are for a decoder: set task: CAUSAL_LM"),
    "system": (lambda r: r.chat or r.messages is not None, "is for conversations: set chat or messages, or drop it"),
    "stride": (lambda r: r.task is TaskType.QUESTION_ANS, "is for QUESTION_ANS: drop it"),
    "unanswerable": (lambda r: r.task is TaskType.QUESTION_ANS, "is for QUESTION_ANS: drop it"),
    "max_new_tokens": (_writes_texts, "is for texts that a language model writes: drop it, or the labels or choices"),
}
"""For each of these fields whether a recipe uses it, and the message where it does not."""


def check_dependent_fields(recipe: RecipeFields) -> None:
    """Check that every field that is not at its default has an effect.

    Raises:
        ValueError: a field has no effect.
    """
    for name, (is_used, message) in NEEDS.items():
        value = getattr(recipe, name)
        if value and value != type(recipe).model_fields[name].default and not is_used(recipe):
            raise ValueError(f"{name} {message}")
