"""A recipe's task by several methods and baselines, one after the other: each one's time and memory is its own."""

from __future__ import annotations

from collections.abc import Sequence

from softtune.experiments.cases import ENTRIES, Case
from softtune.experiments.experiment import run_cases
from softtune.experiments.outcomes import Entry
from softtune.training.recipe import Recipe
from softtune.training.setup import Progress


def compare(
    recipe: Recipe, names: Sequence[str] = ENTRIES, *, seeds: int = 3, progress: Progress = lambda *_: None
) -> list[Entry]:
    """Run a recipe's task by several methods and baselines.

    Args:
        recipe: the task, the data and the steps. Its output is the folder of the comparison.
        names: of ``ENTRIES``.
        seeds: runs of each, with the recipe's seed and those that follow it.
        progress: told of every step.

    Raises:
        ConfigError: an unknown name, or a recipe without evaluation rows.
        DataError: the data does not fit.
    """
    fields = recipe.model_dump(exclude_unset=True) | {"ensemble": 1}
    cases = [
        Case.of(
            fields,
            name,
            {},
            name=name,
            number=ENTRIES.index(name) if name in ENTRIES else 0,
            seeds=seeds,
            is_alone=True,
        )
        for name in names
    ]
    return [entry for entries in run_cases(cases, at_once=1, progress=progress) for entry in entries]
