"""The rows that a recipe trains and evaluates on."""

from __future__ import annotations

from datasets import Dataset

from softtune.data import Task, each_row, load_records, sample_balanced, split_records
from softtune.data.sources import fingerprint
from softtune.errors import DataError
from softtune.training.recipe import Recipe


def training_and_evaluation_rows(recipe: Recipe, task: Task) -> tuple[Dataset, Dataset | None]:
    """Training rows and, where there are any, evaluation rows.

    Raises:
        DataError: a file is missing, damaged or empty, a row does not fit the task, or there are too few.
    """
    rows = _labelled(task, recipe.train, recipe.train_split)
    held_out = None
    if recipe.evaluation is not None:
        held_out = _labelled(task, recipe.evaluation, recipe.evaluation_split)
    elif recipe.test_size:
        rows, held_out = split_records(rows, test_size=recipe.test_size, seed=recipe.seed)
    return rows if recipe.examples is None else _sample(recipe, rows, recipe.examples), held_out


def _labelled(task: Task, source: str, split: str) -> Dataset:
    """Records with texts and labels, checked while their rows still count as in the file."""
    rows = load_records(source, split=split)
    try:
        each_row(rows, [*task.template.fields, task.label_column], task.check)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return rows


def fingerprints(task: Task, training: Dataset, held_out: Dataset | None) -> dict[str, str]:
    """What tells whether rows are those of an earlier run, by "training" and "evaluation"."""
    columns = [*task.template.fields, task.label_column]
    parts = {"training": training, "evaluation": held_out}
    return {name: fingerprint(rows, columns) for name, rows in parts.items() if rows is not None}


def _sample(recipe: Recipe, rows: Dataset, size: int) -> Dataset:
    if size > len(rows):
        raise DataError(f"examples is {size} and there are {len(rows)} rows to train on: lower it or leave it out")
    if recipe.shares is None:
        return rows.shuffle(seed=recipe.seed).select(range(size))
    return sample_balanced(rows, column=recipe.label_column, size=size, seed=recipe.seed, shares=recipe.shares)
