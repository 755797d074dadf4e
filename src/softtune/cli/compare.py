"""``softtune compare``: a recipe's task by several methods and baselines, under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from softtune.cli.console import console, progress_bars, quiet
from softtune.experiments import report
from softtune.experiments.compare import ENTRIES, compare
from softtune.training.recipe import Recipe


def command(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file: the task, the data and the steps.")],
    output: Annotated[str, typer.Option(help="The comparison's folder.")],
    entries: Annotated[
        str, typer.Option(help=f"What to compare, separated by commas: some of {', '.join(ENTRIES)}.")
    ] = ",".join(ENTRIES),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds that follow one another.")] = 3,
) -> None:
    """Compare methods and baselines on the task of a recipe: quality, trained parameters, time and memory.

    All take the same steps on the same rows. What is finished is kept, so that the same command goes on after Ctrl-C.
    The folder gets a page, report.html, and a table in Markdown.
    """
    quiet()
    chosen = Recipe.load(recipe, {"output": output})
    with progress_bars() as progress:
        found = compare(chosen, [name.strip() for name in entries.split(",")], seeds=seeds, progress=progress)
    head, lines = report.rows(found)
    table = Table(*head)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for failure in report.failures(found):
        console.print(failure)
    console.print(f"The page is {report.write(Path(output), title=Path(recipe).stem)}.", soft_wrap=True)
