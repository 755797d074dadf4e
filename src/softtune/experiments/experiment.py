"""Runs the cases of an experiment, at once where possible, and saves the results of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from softtune.errors import ConfigError, DataError, SofttuneError
from softtune.experiments.cases import Case
from softtune.experiments.outcomes import Entry
from softtune.experiments.runs import run_at_once
from softtune.load_fields import LoadFields
from softtune.training.compatibility import shared
from softtune.training.folder import RunFolder
from softtune.training.progress import Phase, Progress
from softtune.training.recipe import NOT_PUSHED, holds_adapter
from softtune.training.setup import Rows

Runner = Callable[[Sequence[Sequence[Case]], Progress], Iterator[tuple[Case, list[Entry]]]]
"""Runs bundles of cases, and yields each case with its results."""

ALL_CASES = Phase("all")
"""Phase of a whole experiment, whose cases are counted."""

NOT_OF_ROWS = (
    *("method", "options", "learning_rate", "schedule", "warmup_steps", "epochs", "max_steps", "batch_size"),
    *("gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm", "label_smoothing_factor"),
    *("group_by_length", "dataloader_num_workers", "patience", "eval_steps", "metric_for_best_model"),
    *("validation_size", "bf16", "gradient_checkpointing", "compile", "ensemble"),
    *("trunk_cache", "trunk_cache_disk", "save_steps", "save_total_limit", "report_to", "output", "seed", "data_seed"),
    *NOT_PUSHED,
    *LoadFields.model_fields,
)
"""Recipe fields that do not determine its rows. The two seeds determine them together, as ``rows_seed``."""


def with_rows(cases: Sequence[Case], known: dict[str, dict[str, str]] | None = None) -> list[Case]:
    """Cases with the fingerprints of their rows; each data set is read once.

    Args:
        cases: cases of one experiment.
        known: fingerprints from earlier calls; new ones are added to it.

    Raises:
        ConfigError: a recipe has no evaluation rows, or the folder is an adapter's.
        DataError: the data does not fit.
    """
    if any(case.recipe.evaluation is None and not case.recipe.test_size for case in cases):
        raise ConfigError("an experiment needs rows to evaluate on", "set evaluation or test_size")
    folder = cases[0].store.folder
    if holds_adapter(folder):
        raise ConfigError(f"{folder} has an adapter", "name another output")
    known = {} if known is None else known
    found = []
    for case in cases:
        key = repr((case.recipe.model_dump(exclude={*NOT_OF_ROWS}), case.recipe.rows_seed))
        try:
            known[key] = known.get(key) or Rows.load(case.recipe).fingerprints
        except DataError as error:
            raise error.at(case.name) from error
        found.append(dataclasses.replace(case, rows=known[key]))
    return found


def run_here(bundles: Sequence[Sequence[Case]], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Run bundles one after the other in this process."""
    for bundle in bundles:
        yield from run_bundle(bundle, progress)


def run_cases(
    cases: Sequence[Case], *, at_once: int, run: Runner = run_here, progress: Progress = lambda *_: None
) -> list[list[Entry]]:
    """Run the cases without saved results, and save theirs.

    Args:
        cases: cases of one experiment, with the fingerprints of their rows.
        at_once: number of runs that train at once on one base model.
        run: runs the cases; in this process by default.
        progress: called at every step.

    Returns:
        The results of each case.

    Raises:
        ConfigError: the folder has another experiment.
        DataError: the data does not fit.
    """
    store = cases[0].store
    found = {case.name: store.final_results(case.name, case.configuration) for case in cases}
    left = list({case.name: case for case in cases if found[case.name] is None}.values())
    _check_folders(left)
    progress(ALL_CASES, len(found) - len(left), len(found), "")
    try:
        for done, (case, entries) in enumerate(run(bundles(left, at_once), progress), start=1):
            store.save(case.name, case.number, case.configuration, entries)
            found[case.name] = entries
            progress(ALL_CASES, len(found) - len(left) + done, len(found), "")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; go on with the same command") from None
    return [found[case.name] or [] for case in cases]


def _check_folders(cases: Sequence[Case]) -> None:
    """Check that existing folders of runs belong to the same recipes.

    Raises:
        ConfigError: a folder was made by another recipe.
    """
    for folder in (RunFolder(run) for case in cases if case.is_adapter for run in case.runs):
        if folder.is_finished or folder.is_unfinished:
            folder.check_recipe()


def bundles(cases: Sequence[Case], at_once: int) -> list[list[Case]]:
    """Group cases that train at once on one base model: at most ``at_once`` runs, but at least one case, per group."""
    found: list[list[Case]] = []
    for case in cases:
        if found and _fit_together([*found[-1], case], at_once):
            found[-1].append(case)
        else:
            found.append([case])
    return found


def run_bundle(cases: Sequence[Case], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Run cases at once. If one of several fails, each is run alone to find out which.

    Raises:
        DataError: the data does not fit.
    """
    try:
        yield from zip(cases, run_at_once(cases, progress), strict=True)
    except (SofttuneError, torch.OutOfMemoryError) as error:
        if len(cases) == 1 and isinstance(error, DataError):
            raise error.at(cases[0].name) from error
        if len(cases) == 1:
            yield cases[0], cases[0].failed(error)
            return
        for case in cases:
            yield from run_bundle([case], progress)


def _fit_together(cases: Sequence[Case], at_once: int) -> bool:
    runs = sum(case.seeds * case.recipe.ensemble for case in cases)
    alike = all(case.is_adapter and shared(case.recipe) == shared(cases[0].recipe) for case in cases)
    return alike and runs <= at_once and not any(case.is_alone for case in cases)
