"""Any fields of a recipe over a grid, or where Optuna's sampler looks, each point with several seeds.

Points over one base model train at once, as adapters of the rows of one batch. What is finished is kept, and the same
sweep goes on behind it: a grid's other points, or a search that is told what its first points came to.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softtune import storage
from softtune.errors import ConfigError
from softtune.evaluation.answers import metric_names
from softtune.evaluation.metrics import direction
from softtune.experiments.cases import Case
from softtune.experiments.experiment import Runner, run_cases, run_here, with_rows
from softtune.experiments.outcomes import SWEEP_NAME, Entry, entries_of, forget_failures, said
from softtune.training.fields import checked, read_fields, to_yaml
from softtune.training.recipe import Recipe
from softtune.training.setup import Progress

HINTS = {"over": "for each field list values, or {low, high} to search in, or name fields by points"}
"""What to write in fields of several types."""

ENTRY = "entry"
"""The axis, or field, that names a method or baseline."""


class Range(BaseModel):
    """Numbers to search in; whole ones if both ends are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    low: int | float
    high: int | float
    log: bool = False
    """Whether each power of ten is as likely as the next."""

    @model_validator(mode="after")
    def _is_range(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("a range goes from low up to high, and with log from above 0")
        return self


Axis = Range | list[Any] | dict[str, dict[str, Any]]
"""Numbers to search in, values of a field, or named points, each with several fields."""


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
        """Read a YAML file, some of its fields replaced; of a recipe's file, a sweep over that recipe.

        Args:
            path: of the file.
            overrides: fields of the sweep.
            of_recipe: fields of the recipe to replace beside those that the file does.

        Raises:
            ConfigError: there is no such file, it is no YAML mapping, or a field is unknown, missing or out of range.
        """
        fields = read_fields(path, "sweep")
        if "model" in fields:
            fields = {"recipe": Path(path).name}
        fields = {**fields, **(overrides or {})}
        if of_recipe:
            fields["fields"] = {**(fields.get("fields") or {}), **of_recipe}
        sweep = checked(cls, fields, "sweep", HINTS)
        return sweep.model_copy(update={"recipe": str(Path(path).parent / sweep.recipe)})

    def save(self, folder: Path) -> None:
        """Write it into its folder, where its page finds what it asks, and forget what failed there and may not again.
        Raises ConfigError where another is there that has come to something."""
        there = Sweep.load(folder / SWEEP_NAME) if (folder / SWEEP_NAME).is_file() else None
        done = [entry for entry in entries_of(folder) if entry.is_final]
        if done and (there is None or not self._goes_on_from(there, done)):
            raise ConfigError(f"{folder} has another experiment: name another output, or delete it")
        forget_failures(folder)
        fields = self.model_dump(mode="json", exclude_unset=True) | {"recipe": str(Path(self.recipe).resolve())}
        with storage.staged(folder) as stage:
            (stage / SWEEP_NAME).write_text(to_yaml(fields), encoding="utf-8")

    def _goes_on_from(self, other: Sweep, done: Sequence[Entry]) -> bool:
        """Whether all points of another sweep that came to something are among this one's."""
        if [*self.over] != [*other.over] or (self.fields, self.seeds) != (other.fields, other.seeds):
            return False
        if self.trials is not None or other.trials is not None:
            own, others = ((each.over, each.metric, each.at_once) for each in (self, other))  # all steer a search
            return own == others and (self.trials or 0) >= (other.trials or math.inf)
        return all(_has(self.over[name], other.over[name], entry.at[name]) for entry in done for name in self.over)

    @property
    def points(self) -> Iterator[dict[str, Any]]:
        """All points of the grid: values, or names, by axis."""
        for values in itertools.product(*self.over.values()):
            yield dict(zip(self.over, values, strict=True))

    @property
    def size(self) -> int:
        """How many points run."""
        return self.trials or sum(1 for _ in self.points)

    def changes(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's fields at a point."""
        changes: dict[str, Any] = {}
        for name, value in point.items():
            axis = self.over[name]
            changes |= axis[value] if isinstance(axis, dict) else {name: value}
        return changes


def _has(axis: Axis, other: Axis, value: Any) -> bool:
    """Whether an axis has a value, or named point, of another."""
    if isinstance(axis, dict) and isinstance(other, dict):
        return value in axis and axis[value] == other[value]
    return isinstance(axis, list) and isinstance(other, list) and value in axis


def sweep(asked: Sweep, recipe: Recipe, *, run: Runner = run_here, progress: Progress = lambda *_: None) -> list[Entry]:
    """Run a sweep.

    Args:
        asked: the sweep.
        recipe: its recipe; its output is the folder of the sweep.
        run: runs cases that train at once; in this process by default, or on Ray.
        progress: told of every step.

    Raises:
        ConfigError: a point's fields do not go together, the metric does not fit the task, there is another sweep in
            the folder, Optuna is not installed, or a recipe without evaluation rows.
        DataError: the data does not fit.
    """
    if asked.trials is not None:
        return _search(asked, recipe, run, progress)
    cases = with_rows([_case(asked, recipe, number, point) for number, point in enumerate(asked.points)])
    _check_metric(asked, cases)
    asked.save(Path(recipe.output))
    found = run_cases(cases, at_once=asked.at_once, run=run, progress=progress)
    return [entry for entries in found for entry in entries]


def _check_metric(asked: Sweep, cases: Sequence[Case]) -> None:
    names = metric_names(cases[0].recipe.definition)
    if other := next((case for case in cases if metric_names(case.recipe.definition) != names), None):
        raise ConfigError(f"{other.name} is not measured as {cases[0].name} is: sweep over one kind of answers")
    if asked.metric is not None and asked.metric not in names:
        raise ConfigError(f"metric {asked.metric!r} does not fit the task: use one of {', '.join(names)}")


def _case(asked: Sweep, recipe: Recipe, number: int, point: dict[str, Any]) -> Case:
    changes = {**asked.fields, **asked.changes(point)}
    entry = changes.pop(ENTRY, "")
    name = ", ".join(said(axis.rpartition(".")[2], value) for axis, value in point.items())
    fields = recipe.model_dump(exclude_unset=True)
    return Case.of(fields, entry, changes, name=name, number=number, seeds=asked.seeds, at=point)


def _search(asked: Sweep, recipe: Recipe, run: Runner, progress: Progress) -> list[Entry]:
    """As many points at a time as train at once. The sampler's choices follow from its seed and from what it was told,
    so that a search that was interrupted begins with the same points, which are kept."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("trials needs the package optuna: pip install optuna, or drop trials") from error
    assert asked.trials is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=asked.fields.get("seed", recipe.seed))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found: list[Entry] = []
    rows: dict[str, dict[str, str]] = {}
    width = max(1, asked.at_once // asked.seeds)
    for first in range(0, asked.trials, width):
        trials = [study.ask() for _ in range(min(width, asked.trials - first))]
        cases = with_rows([_case(asked, recipe, trial.number, _point(asked, trial)) for trial in trials], rows)
        _check_metric(asked, cases)
        if not first:
            asked.save(Path(recipe.output))
        each = run_cases(cases, at_once=asked.at_once, run=run, progress=progress)
        for trial, entries in zip(trials, each, strict=True):
            if entries[0].failure:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                metric = asked.metric or entries[0].metrics[0]
                study.tell(trial, direction(metric) * entries[0].mean(metric))
            found += entries
    return found


def _point(asked: Sweep, trial: Any) -> dict[str, Any]:
    """Where a trial looks."""
    point: dict[str, Any] = {}
    for name, axis in asked.over.items():
        if not isinstance(axis, Range):
            values = [*axis]
            point[name] = values[trial.suggest_categorical(name, range(len(values)))]
        elif isinstance(axis.low, int) and isinstance(axis.high, int):
            point[name] = trial.suggest_int(name, axis.low, axis.high, log=axis.log)
        else:
            point[name] = float(f"{trial.suggest_float(name, axis.low, axis.high, log=axis.log):.3g}")
    return point
