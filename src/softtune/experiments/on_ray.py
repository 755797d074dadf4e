"""Runs experiments on Ray Tune: bundles of cases in parallel, on one machine or on a cluster.

All machines must have the recipes, the data and the experiment's folder at the same paths. Workers run in the caller's
working directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from softtune.errors import ConfigError
from softtune.experiments.cases import Case
from softtune.experiments.experiment import Runner, run_bundle
from softtune.experiments.outcomes import Entry
from softtune.extras import missing
from softtune.training.progress import Phase, Progress

DONE = "cases"
"""Key of a worker's reports: how many cases of its bundle are saved."""
ON_RAY = Phase("on Ray")
"""Phase of all bundles on Ray, whose cases are counted."""


def on_ray(address: str) -> Runner:
    """A runner on Ray Tune.

    Args:
        address: a cluster's address, as ``ray.init`` takes it: auto for the one that this machine belongs to, or local
            for a new one on this machine alone.

    Raises:
        MissingExtraError: the extra ``ray`` is not installed.
        ConfigError: there is no such cluster.
    """
    try:
        import ray.tune
    except ImportError as error:
        raise missing("ray[tune]", "ray") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"no Ray cluster at {address!r} ({reason})", "use --ray local, or start one") from error
    return _run


def _run(bundles: Sequence[Sequence[Case]], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Run each bundle on one CPU, or on one GPU where there are any."""
    from ray import tune

    if not bundles:
        return
    resources: dict[str, float] = {"gpu": 1} if torch.cuda.is_available() else {"cpu": 1}
    trial = tune.with_parameters(_trial, bundles=bundles, start=str(Path.cwd()))
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"bundle": tune.grid_search([*range(len(bundles))])},
        run_config=tune.RunConfig(
            storage_path=str((bundles[0][0].store.folder / "ray").resolve()),
            verbose=0,
            callbacks=[_telling(progress, sum(map(len, bundles)))],
        ),
    )
    results = tuner.fit()
    yield from _found(bundles, [results[i] for i in range(len(results))])


def _found(bundles: Sequence[Sequence[Case]], results: Sequence[Any]) -> Iterator[tuple[Case, list[Entry]]]:
    """Yield the results of the cases that have run.

    Raises:
        KeyboardInterrupt: Ctrl-C has ended other cases. Ray handles the signal itself, so it is raised again here.
    """
    for result in results:
        if result.error is not None:
            raise getattr(result.error, "cause", result.error)  # as it was on the worker, without Ray's traceback
    reports = [result.metrics for result in results if DONE in (result.metrics or {})]
    for report in reports:
        done = bundles[report["config"]["bundle"]][: report[DONE]]
        yield from ((case, case.store.results(case.name)) for case in done)
    if sum(report[DONE] for report in reports) < sum(map(len, bundles)):
        raise KeyboardInterrupt("stopped; go on with the same command")


def _telling(progress: Progress, total: int) -> Any:
    """A Ray callback that reports how many cases are done."""
    from ray import tune

    class Telling(tune.Callback):
        def __init__(self) -> None:
            self.done: dict[str, int] = {}
            progress(ON_RAY, 0, total, "")

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
            self.done[trial.trial_id] = result[DONE]
            progress(ON_RAY, sum(self.done.values()), total, "")

        def __reduce__(self) -> tuple[Any, ...]:  # Ray pickles its settings, and progress belongs to this process
            return (tune.Callback, ())

    return Telling()


def _trial(config: dict[str, Any], bundles: Sequence[Sequence[Case]], start: str) -> None:
    """Run a bundle on a worker, and save its results, so that an interrupt loses no finished ones."""
    from ray import tune

    os.chdir(start)
    torch.set_num_threads(1)
    for done, (case, entries) in enumerate(run_bundle(bundles[config["bundle"]], lambda *_: None)):
        case.store.save(case.name, case.number, case.configuration, entries)
        tune.report({DONE: done + 1})
