"""``softtune sweep``: run a recipe over a grid of field values, or at the points of a search."""

from __future__ import annotations

from pathlib import Path

from softtune.cli.console import console, progress_bars, quiet
from softtune.cli.entries import exit_on_failures, show_entries
from softtune.cli.flags import argument, option, overrides, read, with_flags
from softtune.experiments import report
from softtune.experiments.experiment import run_here
from softtune.experiments.on_ray import on_ray
from softtune.experiments.sweep import Sweep, sweep
from softtune.training.recipe import Recipe


def command(
    file: str,
    output: str,
    over: str | None,
    seeds: int | None,
    trials: int | None,
    ray: str | None,
    **flags: str | None,
) -> None:
    """Run a recipe at many points: every combination of some fields' values, or as many as a search tries.

    Points over one base model train at once. What is finished is kept, so that the same command goes on after Ctrl-C.
    The folder gets a page, report.html, with a picture, and the same in Markdown.
    """
    quiet()
    options = {"over": None if over is None else read("over", over), "seeds": seeds, "trials": trials}
    given = {name: value for name, value in options.items() if value is not None}
    config = Sweep.load(file, given, **overrides(flags))
    runner = run_here if ray is None else on_ray(ray)
    with progress_bars() as progress:
        results = sweep(config, Recipe.load(config.recipe, {"output": output}), run=runner, progress=progress)
    show_entries(results, config.metric)
    console.print(f"The page is {report.write(Path(output))}.", soft_wrap=True)
    exit_on_failures(results)


with_flags(
    command,
    [
        argument("file", str, help="The sweep, or a recipe to sweep over, a YAML file."),
        option("output", str, help="The sweep's folder."),
        option("over", str | None, None, help="Values by field, such as '{learning_rate: [0.003, 0.01]}'."),
        option("seeds", int | None, None, min=1, help="Runs of each point, with seeds that follow one another."),
        option("trials", int | None, None, min=1, help="Points that Optuna chooses; by default all of the grid run."),
        option("ray", str | None, None, help="Run on Ray Tune: local, auto, or a cluster's address."),
    ],
)
