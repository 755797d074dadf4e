"""Compares methods and baselines on a recipe's task. They run in sequence, to measure the time and memory of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softtune.errors import ConfigError
from softtune.experiments.cases import DEFAULT_ENTRIES, ENTRIES, PROMPTS, REPLACED, Case
from softtune.experiments.experiment import run_cases, with_rows
from softtune.experiments.outcomes import Entry
from softtune.experiments.result_store import ResultStore, with_defaults
from softtune.training.progress import Progress
from softtune.training.recipe import Recipe


def compare(
    recipe: Recipe,
    names: Sequence[str] = DEFAULT_ENTRIES,
    *,
    seeds: int = 3,
    learning_rates: Mapping[str, float] = {},
    progress: Progress = lambda *_: None,
) -> list[Entry]:
    """Run a recipe's task with several methods and baselines.

    Args:
        recipe: the task, the data and the steps. Its output is the folder of the comparison.
        names: some of ``ENTRIES``.
        seeds: runs of each entry, with the recipe's seed and those that follow it.
        learning_rates: peak learning rates by name. Other entries have their default; the recipe's own method has the
            recipe's.
        progress: called at every step.

    Raises:
        ConfigError: a name is unknown, a learning rate is for an entry that is not compared or not trained, the recipe
            is an ensemble or has no evaluation rows, or the folder has another experiment, such as a comparison with
            other rows, steps or seeds.
        DataError: the data does not fit.
    """
    if ResultStore(Path(recipe.output)).has_sweep:
        raise ConfigError(f"{recipe.output} has another experiment", "name another output, or delete it")
    if len({*names}) < len(names) or not all(names):
        raise ConfigError(f"entries are {', '.join(map(repr, names))}", "name each once")
    if recipe.ensemble > 1:
        raise ConfigError("a comparison is of single adapters", "set ensemble to 1, or sweep over it")
    if idle := [name for name in learning_rates if name not in names or name in PROMPTS]:
        raise ConfigError(f"a learning rate for {idle[0]!r}, which is not trained", "compare it, or drop its rate")
    fields = recipe.model_dump(exclude_unset=True)
    cases = [
        Case.from_fields(
            fields,
            name,
            {"learning_rate": learning_rates[name]} if name in learning_rates else {},
            name=name,
            number=ENTRIES.index(name) if name in ENTRIES else 0,
            seeds=seeds,
            is_alone=True,
        )
        for name in names
    ]
    cases = with_rows(cases)
    _check_budget(cases[0])
    return [entry for entries in run_cases(cases, at_once=1, progress=progress) for entry in entries]


def _check_budget(case: Case) -> None:
    """Check that the saved results of the other entries have the rows, steps and seeds of this case.

    Raises:
        ConfigError: they have others.
    """
    budget = _budget(case.configuration)
    for other in case.store.configurations():
        case.store.check_same(_budget(other), budget)


def _budget(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a case's configuration that all entries of a comparison share."""
    recipe = {name: value for name, value in with_defaults(configuration)["recipe"].items() if name not in REPLACED}
    return {**recipe, "seeds": configuration["seeds"], "rows": configuration["rows"]}
