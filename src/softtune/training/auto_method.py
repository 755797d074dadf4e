"""``method: auto``: the method, size, start and learning rate that did best on the measured task nearest to a recipe's.

The table is written by ``benchmarks/studies.py lora --write`` from its runs. Among the tasks of the same kind (a head
or none, labels or texts) the nearest is the one whose number of training rows has the smallest ratio to the recipe's.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from softtune.data import load_records
from softtune.errors import ConfigError
from softtune.peft_types import PeftType, TaskType
from softtune.training.context_tuning import KEYS_AND_VALUES, OF_EXAMPLES
from softtune.training.recipe_fields import RecipeFields

TABLE = Path(__file__).with_name("measured_tasks.json")
TEXT = "init_text"
"""The one option that a recipe may have: a text that its prefix starts from."""


class MeasuredTask(NamedTuple):
    """A measured task, with what did best on it."""

    title: str
    task: TaskType
    writes: bool
    """Whether answers are generated, and not scored."""
    rows: int
    """Training rows."""
    model: str
    fields: dict[str, Any]
    """The recipe fields of what did best, without a text of that task."""
    from_text: bool
    """Whether its prefix started from such a text."""
    metric: str
    value: float
    """The mean over seeds."""
    seeds: int


@cache
def measured_tasks() -> tuple[MeasuredTask, ...]:
    """The table."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))["tasks"]
    return tuple(MeasuredTask(**{**entry, "task": TaskType(entry["task"])}) for entry in entries)


def nearest(task: TaskType, rows: int, *, writes: bool) -> MeasuredTask:
    """The measured task nearest to one with so many training rows."""

    def distance(other: MeasuredTask) -> tuple[bool, bool, bool, float]:
        is_other_kind = other.task.has_head != task.has_head
        return is_other_kind, other.task is not task, other.writes != writes, abs(math.log(other.rows / rows))

    return min(measured_tasks(), key=distance)


def check_open(fields: Mapping[str, Any]) -> None:
    """Check that a recipe leaves to ``method: auto`` what it chooses.

    Raises:
        ConfigError: it does not.
    """
    options = fields.get("options") or {}
    given = [name for name in options if name != TEXT] if isinstance(options, Mapping) else []
    if given := [*given, *(name for name in ("start", *OF_EXAMPLES) if fields.get(name) is not None)]:
        raise ConfigError(f"recipe: method: auto chooses {given[0]}", f"drop it, or name a method; {TEXT} may stay")


def chosen_fields(recipe: RecipeFields, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are chosen for a recipe; warns of why, in one line.

    Args:
        recipe: the recipe, with any method.
        options: its options, ``init_text`` or nothing.

    Raises:
        DataError: its training rows cannot be read.
    """
    rows, writes = _num_rows(recipe), not (recipe.task.has_head or recipe.labels or recipe.choices)
    entry = nearest(recipe.task, rows, writes=writes)
    chosen = _from_text(entry.fields, options) if options else {**entry.fields}
    if recipe.learning_rate is not None:
        chosen["learning_rate"] = recipe.learning_rate
    line = (
        f"method auto: {_in_words(entry.fields)}, which did best on {entry.title} ({entry.metric} {entry.value:.3f}, "
        f"{entry.rows} rows, {entry.model}, seeds: {entry.seeds}), the measured task nearest to this one of {rows} rows"
    )
    if (entry.task, entry.writes) != (recipe.task, writes):
        line += ", though of another kind"
    if entry.from_text and not options:
        line += f"; there it started from a text, give yours by options: {{{TEXT}: ...}}"
    if options and TEXT not in json.dumps(chosen["options"]):
        line += f"; it has no use for {TEXT}"
    warnings.warn(line, stacklevel=3)
    return chosen


def _num_rows(recipe: RecipeFields) -> int:
    """About how many rows it trains on."""
    if recipe.shots and recipe.labels:
        return recipe.shots * len(recipe.labels)
    sources = [recipe.train] if isinstance(recipe.train, str) else recipe.train
    rows = sum(len(load_records(each, split=recipe.train_split, columns=recipe.columns)) for each in sources)
    if recipe.evaluation is None:
        rows -= int(recipe.test_size if recipe.test_size >= 1 else rows * recipe.test_size)
    return max(1, min(rows, recipe.examples or rows))


def _from_text(chosen: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen fields, with a prefix that starts from a text; as they are where there is no prefix. A start from
    examples goes, and with it the learning rate, which was for that."""

    def started(method: str, own: Mapping[str, Any]) -> dict[str, Any]:
        return {**own, **options} if PeftType(method) in KEYS_AND_VALUES else {**own}

    if parts := chosen["options"].get("parts"):
        return {**chosen, "options": {"parts": [started(part["peft_type"], part) for part in parts]}}
    found = {**chosen, "options": started(chosen["method"], chosen["options"])}
    return {**found, "start": None, "learning_rate": None} if chosen.get("start") else found


def _in_words(chosen: Mapping[str, Any]) -> str:
    """The chosen method, with its parts, its size, its start and its learning rate."""
    options = chosen["options"]
    parts = options.get("parts") or [{"peft_type": chosen["method"], **options}]
    each = [
        part["peft_type"] + (f" of {part['num_virtual_tokens']} virtual tokens" if "num_virtual_tokens" in part else "")
        for part in parts
    ]
    start = " from examples" if chosen.get("start") == "examples" else ""
    return f"{' + '.join(each)}{start} at learning rate {chosen['learning_rate']:g}"
