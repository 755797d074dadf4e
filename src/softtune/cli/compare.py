"""``softtune compare``: compare methods and baselines on a recipe's task, under one budget."""

from __future__ import annotations

from pathlib import Path

from softtune.cli.console import console, progress_bars, quiet
from softtune.cli.entries import exit_on_failures, show_entries
from softtune.cli.flags import argument, option, overrides, read_mapping, with_flags
from softtune.experiments import report
from softtune.experiments.cases import DEFAULT_ENTRIES, entry_named
from softtune.experiments.compare import compare
from softtune.training.recipe import Recipe


def command(recipe: str, output: str, entries: str, seeds: int, learning_rates: str, **flags: str | None) -> None:
    """Compare methods and baselines on the task of a recipe: quality, trained parameters, time and memory.

    All take the same steps on the same rows. What is finished is kept, so that the same command goes on after Ctrl-C.
    The folder gets a page, report.html, and a table in Markdown.
    """
    quiet()
    chosen = Recipe.load(recipe, {**overrides(flags), "output": output})
    names = [entry_named(name) for name in entries.split(",")]
    rates = read_mapping("learning_rates", learning_rates)
    with progress_bars() as progress:
        results = compare(chosen, names, seeds=seeds, learning_rates=rates, progress=progress)
    show_entries(results)
    console.print(f"The page is {report.write(Path(output))}.", soft_wrap=True)
    exit_on_failures(results)


with_flags(
    command,
    [
        argument("recipe", str, help="The recipe, a YAML file: the task, the data and the steps."),
        option("output", str, help="The comparison's folder."),
        option("entries", str, ", ".join(DEFAULT_ENTRIES), help="What to compare, separated by commas."),
        option("seeds", int, 3, min=1, help="Runs of each, with seeds that follow one another."),
        option("learning_rates", str, "{}", help="By entry, such as '{bitfit: 0.001}'; others have theirs."),
    ],
)
