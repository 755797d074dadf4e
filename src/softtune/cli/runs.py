"""Runs recipes for commands, or measures their steps, and shows what came of it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from softtune.cli import INTERRUPTED
from softtune.cli.console import console, progress_bars
from softtune.cli.tables import show_profile, show_range_test, show_report
from softtune.errors import ConfigError, TrainingError
from softtune.load_options import num_processes
from softtune.training import diagnostics, ranks
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import train_all

SILENT = 99
"""Log level for torch's profiler that no message reaches, so that it writes nothing to stderr."""


def run(recipes: Sequence[Recipe], arguments: Sequence[str], *, resume: bool | str) -> None:
    """Train by recipes and print the reports; after an interrupt, the command that goes on.

    Args:
        recipes: the recipes.
        arguments: those of the command line, by which the command is started again.
        resume: see ``train_all``.

    Raises:
        TrainingError: a run has failed.
    """
    with progress_bars() as progress, ranks.joined():
        results = train_all(recipes, resume=resume, progress=progress)
    reports = [result for result in results if isinstance(result, Report)]
    if unfinished := [report for report in reports if not report.finished]:
        for failure in _failures(recipes, results):
            print(f"softtune: {failure}", file=sys.stderr)
        start = ["torchrun", "--nproc-per-node", str(processes), "-m"] if (processes := num_processes()) > 1 else []
        again = shlex.join([*start, "softtune", *arguments, "--resume"])
        steps = max(report.steps for report in unfinished)
        console.print(f"Stopped after step {steps}. Go on with: {again}", soft_wrap=True)
        sys.exit(INTERRUPTED)
    for recipe, result in zip(recipes, results, strict=True):
        if result is None:
            console.print(f"{recipe.output} was finished before.", soft_wrap=True)
        elif isinstance(result, Report):
            show_report(result, title=recipe.output if len(results) > 1 else "")
    if failures := _failures(recipes, results):
        raise TrainingError("; ".join(failures))


def measure(recipes: Sequence[Recipe], resume: bool, profile: bool, find_learning_rate: bool) -> None:
    """Profile the steps of a recipe, or run its learning rate range test, and print the results."""
    if len(recipes) > 1:
        raise ConfigError("one recipe is measured at a time", "name one")
    if num_processes() > 1:
        raise ConfigError("a recipe is measured in one process", "start it without torchrun")
    if resume:
        raise ConfigError("--resume goes on with a run, and to measure begins none", "leave out one of the two")
    os.environ.setdefault("KINETO_LOG_LEVEL", str(SILENT))
    with console.status("measuring"):
        profiled = diagnostics.profile_recipe(recipes[0]) if profile else None
        tested = diagnostics.find_learning_rate(recipes[0]) if find_learning_rate else None
    if profiled is not None:
        show_profile(profiled)
    if tested is not None:
        show_range_test(tested)


def _failures(recipes: Sequence[Recipe], results: Sequence[Report | TrainingError | None]) -> list[str]:
    """The errors of runs that failed; of several recipes, each with its output folder."""
    failed = [(r, result) for r, result in zip(recipes, results, strict=True) if isinstance(result, TrainingError)]
    return [f"{recipe.output}: {error}" if len(recipes) > 1 else str(error) for recipe, error in failed]
