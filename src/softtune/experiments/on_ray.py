"""Experiments on Ray Tune: bundles of cases run beside each other, on one machine or on a cluster's.

Every machine finds recipes, data and the experiment's folder at the same paths, and starts from the same folder.
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
from softtune.training.setup import Progress


def on_ray(address: str) -> Runner:
    """A runner on Ray Tune.

    Args:
        address: of a cluster, as ``ray.init`` takes it: auto for the one that this machine belongs to, or local for
            one of this machine alone.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray.tune
    except ImportError as error:
        raise ConfigError("experiments on Ray need its package: pip install 'ray[tune]', or leave --ray out") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"no Ray cluster at {address!r} ({reason}): use --ray local, or start one") from error
    return _run


def _run(bundles: Sequence[Sequence[Case]], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Each bundle on one processor, or one GPU where there are any."""
    from ray import tune

    if not bundles:
        return
    resources: dict[str, float] = {"gpu": 1} if torch.cuda.is_available() else {"cpu": 1}
    trial = tune.with_parameters(_trial, bundles=bundles, start=str(Path.cwd()))
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"bundle": tune.grid_search([*range(len(bundles))])},
        run_config=tune.RunConfig(storage_path=str((bundles[0][0].folder / "ray").resolve()), verbose=0),
    )
    progress("on Ray", 0, len(bundles), "")
    results = tuner.fit()
    for result in (results[i] for i in range(len(results))):
        if result.error is not None:
            raise result.error
        assert result.config is not None
        bundle = bundles[result.config["bundle"]]
        yield from ((case, case.kept or []) for case in bundle)


def _trial(config: dict[str, Any], bundles: Sequence[Sequence[Case]], start: str) -> None:
    """Run a bundle on a worker, and keep what it comes to, so that an interrupt loses no more than it."""
    from ray import tune

    os.chdir(start)
    torch.set_num_threads(1)
    for done, (case, entries) in enumerate(run_bundle(bundles[config["bundle"]], lambda *_: None)):
        case.keep(entries)
        tune.report({"cases": done + 1})
