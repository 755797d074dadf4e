"""Sweeps over any fields of a recipe, on a grid or by Optuna's sampler, each point with several seeds.

Points on one base model train at once, as adapters of the rows of one batch. Finished points are saved, and the same
sweep resumes from them: a grid with its other points, a search by giving the sampler the results of its first points.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softtune.errors import ConfigError
from softtune.experiments.cases import Case
from softtune.experiments.experiment import Runner, run_cases, run_here, with_rows
from softtune.experiments.outcomes import Entry, said
from softtune.experiments.result_store import ResultStore
from softtune.extras import require
from softtune.tasks.metrics import direction
from softtune.training.fields import checked, read_fields, to_yaml
from softtune.training.progress import Progress
from softtune.training.recipe import Recipe

HINTS = {"over": "for each field list values, or {low, high} to search in, or name fields by points"}
"""Hints in error messages, for fields of several types."""

ENTRY = "entry"
"""The axis, or field, that names a method or baseline."""


class Range(BaseModel):
    """A range of numbers to search; of integers if both ends are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    low: int | float
    high: int | float
    log: bool = False
    """Whether to sample on a logarithmic scale: each power of ten is as likely as the next."""

    @model_validator(mode="after")
    def _is_range(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("a range goes from low up to high, and with log from above 0")
        return self


Axis = Range | list[Any] | dict[str, dict[str, Any]]
"""A range to search, a list of a field's values, or named points that set several fields each."""


class Sweep(BaseModel):
    """A sweep over a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    recipe: str
    """The recipe, a YAML file; its path starts at the sweep's folder, unless it starts at the root."""
    fields: dict[str, Any] = {}
    """Fields of the recipe to replace; options.name is one option, entry a method or baseline of softtune compare."""
    over: Annotated[dict[str, Axis], Field(min_length=1)]
    """Values by field, each a list; {low, high} or {low, high, log: true} to search in; or fields by a name."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """Runs of each point, with seeds that follow one another."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Points that Optuna chooses; by default all points of the grid run."""
    metric: str | None = None
    """What a search makes as good as it can and a picture shows; by default the task's first metric."""
    at_once: Annotated[int, Field(ge=1)] = 8
    """Runs to train at once over one base model."""
    question: str = ""
    """What the sweep asks, for its page."""
    found: str = ""
    """What it found, for its page."""
    paper: str = ""
    """What the paper found, for its page."""

    @model_validator(mode="after")
    def _fits_together(self) -> Sweep:
        if empty := [name for name, axis in self.over.items() if not axis]:
            raise ValueError(f"over has no values for {empty[0]}: list some")
        points = [point for axis in self.over.values() if isinstance(axis, dict) for point in axis.values()]
        if any("output" in fields for fields in (self.fields, self.over, *points)):
            raise ValueError("a sweep has one folder for all points: name it with --output alone")
        if twice := [name for name, axis in self.over.items() if name in self.fields and not isinstance(axis, dict)]:
            raise ValueError(f"{twice[0]} is both a field and an axis: leave one of the two out")
        lists = {name: [*map(repr, axis)] for name, axis in self.over.items() if isinstance(axis, list)}
        if twice := [name for name, values in lists.items() if len({*values}) < len(values)]:
            raise ValueError(f"over has a value of {twice[0]} twice: list each once")
        if self.trials is None and (ranges := [name for name, axis in self.over.items() if isinstance(axis, Range)]):
            raise ValueError(f"{ranges[0]} is a range to search in: say how many trials, or list values")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, **of_recipe: Any) -> Sweep:
        """Load a sweep from a YAML file, with some fields replaced. A recipe's file gives a sweep over that recipe.

        Args:
            path: path of the file.
            overrides: fields of the sweep to replace.
            of_recipe: fields of the recipe to replace, in addition to those that the file replaces.

        Raises:
            ConfigError: there is no such file, it is not a YAML mapping, or a field is unknown, missing or out of
                range.
        """
        fields = read_fields(path, "sweep")
        if "model" in fields:
            fields = {"recipe": Path(path).name}
        fields = {**fields, **(overrides or {})}
        if of_recipe:
            fields["fields"] = {**(fields.get("fields") or {}), **of_recipe}
        sweep = checked(cls, fields, "sweep", HINTS)
        return sweep.model_copy(update={"recipe": str(Path(path).parent / sweep.recipe)})

    def save(self, store: ResultStore) -> None:
        """Save the sweep with its results, for its report page, and remove failures that may be run again.

        Raises:
            ConfigError: the folder has another experiment with results.
        """
        saved = Sweep.load(store.sweep_file) if store.has_sweep else None
        done = [entry for entry in store.entries() if entry.is_final]
        if done and (saved is None or not self._goes_on_from(saved, done)):
            raise ConfigError(f"{store.folder} has another experiment", "name another output, or delete it")
        store.drop_failures()
        fields = self.model_dump(mode="json", exclude_unset=True) | {"recipe": str(Path(self.recipe).resolve())}
        store.save_sweep(to_yaml(fields))

    def _goes_on_from(self, other: Sweep, done: Sequence[Entry]) -> bool:
        """Whether this sweep can resume another: all finished points of the other are among its own."""
        if [*self.over] != [*other.over] or (self.fields, self.seeds) != (other.fields, other.seeds):
            return False
        if self.trials is not None or other.trials is not None:
            own, others = ((each.over, each.metric, each.at_once) for each in (self, other))  # all steer a search
            return own == others and (self.trials or 0) >= (other.trials or math.inf)
        return all(_has(self.over[name], other.over[name], entry.at[name]) for entry in done for name in self.over)

    @property
    def points(self) -> Iterator[dict[str, Any]]:
        """All points of the grid: a value, or the name of a point, by axis."""
        for values in itertools.product(*self.over.values()):
            yield dict(zip(self.over, values, strict=True))

    @property
    def size(self) -> int:
        """Number of points to run."""
        return self.trials or sum(1 for _ in self.points)

    def changes(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe fields that a point sets."""
        changes: dict[str, Any] = {}
        for name, value in point.items():
            axis = self.over[name]
            changes |= axis[value] if isinstance(axis, dict) else {name: value}
        return changes


def _has(axis: Axis, other: Axis, value: Any) -> bool:
    """Whether an axis has a value, or a named point, of another axis."""
    if isinstance(axis, dict) and isinstance(other, dict):
        return value in axis and axis[value] == other[value]
    return isinstance(axis, list) and isinstance(other, list) and value in axis


def sweep(
    config: Sweep, recipe: Recipe, *, run: Runner = run_here, progress: Progress = lambda *_: None
) -> list[Entry]:
    """Run a sweep.

    Args:
        config: the sweep.
        recipe: its recipe, whose output is the sweep's folder.
        run: runs the cases; in this process by default, or on Ray.
        progress: called at every step.

    Raises:
        ConfigError: a point's fields are incompatible, the metric does not fit the task, the folder has another
            experiment, or the recipe has no evaluation rows.
        MissingExtraError: the sweep is a search, and the extra ``sweep`` is not installed.
        DataError: the data does not fit.
    """
    if config.trials is not None:
        return _search(config, recipe, run, progress)
    cases = with_rows([_case(config, recipe, number, point) for number, point in enumerate(config.points)])
    _check_metric(config, cases)
    config.save(cases[0].store)
    found = run_cases(cases, at_once=config.at_once, run=run, progress=progress)
    return [entry for entries in found for entry in entries]


def _check_metric(config: Sweep, cases: Sequence[Case]) -> None:
    names = cases[0].recipe.definition.metrics
    if other := next((case for case in cases if case.recipe.definition.metrics != names), None):
        raise ConfigError(f"{other.name} is not measured as {cases[0].name} is", "sweep over one kind of answers")
    if config.metric is not None and config.metric not in names:
        raise ConfigError(f"metric {config.metric!r} does not fit the task", f"use one of {', '.join(names)}")


def _case(config: Sweep, recipe: Recipe, number: int, point: dict[str, Any]) -> Case:
    changes = {**config.fields, **config.changes(point)}
    entry = changes.pop(ENTRY, "")
    name = ", ".join(said(axis.rpartition(".")[2], value) for axis, value in point.items())
    fields = recipe.model_dump(exclude_unset=True)
    return Case.from_fields(fields, entry, changes, name=name, number=number, seeds=config.seeds, at=point)


def _search(config: Sweep, recipe: Recipe, run: Runner, progress: Progress) -> list[Entry]:
    """Search with Optuna, in rounds of as many points as train at once.

    The sampler's choices depend on its seed and on the results that it was given. So an interrupted search begins again
    with the same points, whose results are saved.
    """
    require("sweep")
    import optuna

    assert config.trials is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.fields.get("seed", recipe.seed))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found: list[Entry] = []
    rows: dict[str, dict[str, str]] = {}
    width = max(1, config.at_once // config.seeds)
    for first in range(0, config.trials, width):
        trials = [study.ask() for _ in range(min(width, config.trials - first))]
        cases = with_rows([_case(config, recipe, trial.number, _point(config, trial)) for trial in trials], rows)
        _check_metric(config, cases)
        if not first:
            config.save(cases[0].store)
        each = run_cases(cases, at_once=config.at_once, run=run, progress=progress)
        for trial, entries in zip(trials, each, strict=True):
            if entries[0].failure:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                metric = config.metric or entries[0].metrics[0]
                study.tell(trial, direction(metric) * entries[0].mean(metric))
            found += entries
    return found


def _point(config: Sweep, trial: Any) -> dict[str, Any]:
    """The values that an Optuna trial suggests, by axis."""
    point: dict[str, Any] = {}
    for name, axis in config.over.items():
        if not isinstance(axis, Range):
            values = [*axis]
            point[name] = values[trial.suggest_categorical(name, range(len(values)))]
        elif isinstance(axis.low, int) and isinstance(axis.high, int):
            point[name] = trial.suggest_int(name, axis.low, axis.high, log=axis.log)
        else:
            point[name] = float(f"{trial.suggest_float(name, axis.low, axis.high, log=axis.log):.3g}")
    return point
