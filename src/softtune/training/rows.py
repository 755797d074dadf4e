"""Loads, splits and samples the rows that a recipe trains and evaluates on."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, concatenate_datasets

from softtune.data import load_records, sample_balanced, split_records
from softtune.data.formats import quoted
from softtune.data.records import each_row
from softtune.data.sources import fingerprint
from softtune.errors import DataError
from softtune.tasks import Task
from softtune.tasks.texts import alike, with_all_references
from softtune.training.recipe import Recipe


def training_and_evaluation_rows(recipe: Recipe, task: Task) -> tuple[Dataset, Dataset | None]:
    """Load the training rows and, if the recipe has any, the evaluation rows.

    Raises:
        DataError: a file is missing, damaged or empty, a row does not fit the task, or there are too few rows.
    """
    rows = _joined([_labelled(recipe, task, source, recipe.train_split) for source in recipe.sources], task)
    held_out = None
    if recipe.evaluation is not None:
        held_out = _labelled(recipe, task, recipe.evaluation, recipe.evaluation_split)
    elif recipe.test_size:
        rows, held_out = split_rows(rows, task, recipe.test_size, recipe.rows_seed)
    if recipe.shots is not None:
        rows = _few_shot(recipe, task, rows)
    elif recipe.examples is not None:
        rows = _sample(recipe, rows, recipe.examples)
    return rows, None if held_out is None else _evaluated(recipe, task, held_out)


def split_rows(rows: Dataset, task: Task, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into those to train on and those held out: a number of rows, or a share of them.

    For text generation, rows with the same input count once and stay on the same side.
    """
    if not task.merges_references:
        return split_records(rows, test_size=size, seed=seed)
    groups = alike(rows, task.columns)
    numbers = Dataset.from_dict({"group": range(len(groups))})
    kept, held_out = (
        rows.select([row for group in part["group"] for row in groups[group]])
        for part in split_records(numbers, test_size=size, seed=seed)
    )
    return kept, held_out


def check_every_label(task: Task, rows: Dataset) -> None:
    """Check that every label has a training row.

    Raises:
        DataError: a label has none.
    """
    if not task.label_set:
        return
    there = {str(label) for label in rows[task.label_column]}
    if absent := [label for label in task.label_set if label not in there]:
        raise DataError(
            f"none of {len(rows)} training rows is labelled {quoted(absent)}",
            f"add rows, or drop the label{'s' * (len(absent) > 1)}",
        )


def _labelled(recipe: Recipe, task: Task, source: str, split: str) -> Dataset:
    """Load and check the records of one source, while their row numbers are still those of the file."""
    rows = load_records(source, split=split, columns=recipe.columns)
    try:
        each_row(rows, [*task.columns, task.label_column], task.reference)
    except DataError as error:
        raise error.at(source) from error
    return rows


def _joined(parts: Sequence[Dataset], task: Task) -> Dataset:
    """Concatenate the rows of several sources, keeping the columns that the task reads."""
    if len(parts) == 1:
        return parts[0]
    columns = [*dict.fromkeys([*task.columns, task.label_column])]
    return concatenate_datasets([part.select_columns(columns) for part in parts])


def _evaluated(recipe: Recipe, task: Task, rows: Dataset) -> Dataset:
    """The evaluation rows, or a sample of them. For text generation, rows with the same input are merged first."""
    rows = with_all_references(rows, task) if task.merges_references else rows
    size = recipe.evaluation_examples
    if size is None:
        return rows
    if size > len(rows):
        raise DataError(f"evaluation_examples is {size} and there are {len(rows)} rows", "lower it or leave it out")
    return rows.shuffle(seed=recipe.rows_seed).select(range(size))


def _few_shot(recipe: Recipe, task: Task, rows: Dataset) -> Dataset:
    """Sample the same number of rows of each label."""
    assert recipe.shots is not None
    labels = task.label_set
    shares = dict.fromkeys(labels, 1 / len(labels))
    size = recipe.shots * len(labels)
    return sample_balanced(rows, column=recipe.label_column, size=size, seed=recipe.rows_seed, shares=shares)


def fingerprints(task: Task, training: Dataset, held_out: Dataset | None) -> dict[str, str]:
    """Hashes of the rows, by "training" and "evaluation", to compare with those of an earlier run."""
    columns = [*task.columns, task.label_column]
    parts = {"training": training, "evaluation": held_out}
    return {name: fingerprint(rows, columns) for name, rows in parts.items() if rows is not None}


def _sample(recipe: Recipe, rows: Dataset, size: int) -> Dataset:
    if size > len(rows):
        raise DataError(f"examples is {size} and there are {len(rows)} rows to train on", "lower it or leave it out")
    if recipe.shares is None:
        return rows.shuffle(seed=recipe.rows_seed).select(range(size))
    return sample_balanced(rows, column=recipe.label_column, size=size, seed=recipe.rows_seed, shares=recipe.shares)
