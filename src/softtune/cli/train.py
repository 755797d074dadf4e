"""``softtune train``: run one or several recipes. Every field of a recipe is also a flag."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from softtune.cli import INTERRUPTED
from softtune.cli.console import console, progress_bars, quiet
from softtune.cli.flags import argument, option, overrides, with_flags, words
from softtune.cli.tables import show_profile, show_range_test, show_report
from softtune.errors import ConfigError, TrainingError
from softtune.load_options import num_processes
from softtune.training import diagnostics, ranks
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import train_all

SILENT = 99
"""Log level for torch's profiler that no message reaches, so that it writes nothing to stderr."""


def command(
    recipes: list[str],
    resume: bool,
    resume_from: str | None,
    push_to_hub: bool,
    profile: bool,
    find_learning_rate: bool,
    **flags: str | None,
) -> None:
    """Train an adapter by a recipe, or those of several recipes at once, and show what came of it.

    Recipes that share a base model take less time and memory together than one after the other; a flag goes for all of
    them. Ctrl-C saves the runs for --resume.
    """
    quiet()
    changes = {**overrides(flags), **({"push_to_hub": True} if push_to_hub else {})}
    chosen = [Recipe.load(recipe, changes) for recipe in recipes]
    if profile or find_learning_rate:
        _measure(chosen, resume or resume_from is not None, profile, find_learning_rate)
        return
    pushing = ["--push-to-hub"] if push_to_hub else []
    run(chosen, ["train", *recipes, *words(flags), *pushing], resume=resume_from or resume)


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


def _measure(recipes: Sequence[Recipe], resume: bool, profile: bool, find_learning_rate: bool) -> None:
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


with_flags(
    command,
    [
        argument("recipes", list[str], help="The recipe, a YAML file; or several that share a base model."),
        option("resume", bool, False, help="Go on with an interrupted run."),
        option("resume_from", str | None, None, help="Go on from this checkpoint of it, such as checkpoint-100."),
        option("push_to_hub", bool, False, help=str(Recipe.model_fields["push_to_hub"].description)),
        option("profile", bool, False, help="Measure where a step's time goes, and save nothing."),
        option("find_learning_rate", bool, False, help="Try ever higher rates for up to 40 steps, and save nothing."),
    ],
)
