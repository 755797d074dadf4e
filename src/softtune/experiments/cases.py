"""A case of an experiment: a recipe's task with one method, baseline or text prompt, and several seeds.

Knows nothing about how cases are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softtune.errors import ConfigError
from softtune.experiments.baselines import BASELINES
from softtune.experiments.outcomes import Entry
from softtune.experiments.result_store import ResultStore
from softtune.load_options import OF_THE_MACHINE
from softtune.methods import PEFT_TYPE_TO_CONFIG_MAPPING
from softtune.peft_types import PeftType
from softtune.training.context_tuning import OF_EXAMPLES
from softtune.training.recipe import Recipe

METHODS: dict[str, dict[str, Any]] = {
    kind.value.lower().replace("_", "-"): {
        "method": kind,
        **({"options": config.general_options} if config.general_options else {}),
        **({"start": "examples"} if kind is PeftType.CPT else {}),
    }
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
"""Recipe fields that each method replaces. For the recipe's own method, the recipe's fields stay."""

OF_A_START = {"start": None, **OF_EXAMPLES}
"""Recipe fields of a start from examples, as they are without one."""

REPLACED = ("method", "options", "learning_rate", "trunk_cache", "trunk_cache_disk", *OF_A_START)
"""Recipe fields that an entry may replace."""

OPTION = "options."
"""What stands before the name of one option."""

PROMPTS = {"zero-shot": 0, "few-shot": 4}
"""Number of labelled rows (shots) in front of each record; the base model is not trained."""

ENTRIES = (*METHODS, *BASELINES, *PROMPTS)
"""Names of the methods, baselines and prompts to compare."""

DEFAULT_METHODS = tuple(n for n, f in METHODS.items() if PEFT_TYPE_TO_CONFIG_MAPPING[f["method"]].is_for_any_rows)
"""Names of the methods that are meant where none is named."""

DEFAULT_ENTRIES = (*DEFAULT_METHODS, *BASELINES, *PROMPTS)
"""What is compared where nothing is named."""


def entry_named(name: str) -> str:
    """Normalize any spelling of an entry's name, such as PREFIX_TUNING."""
    return name.strip().lower().replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe to run with several seeds."""

    name: str
    number: int
    """Its position among the cases of the experiment."""
    entry: str = ""
    """One of ``ENTRIES``; empty for the recipe's own method."""
    recipe: Recipe
    """Its output is the experiment's folder."""
    seeds: int
    at: dict[str, Any] = field(default_factory=dict)
    """See ``Entry``."""
    rows: dict[str, str] = field(default_factory=dict)
    """Fingerprints of its rows, by "training" and "evaluation"."""
    baseline_options: dict[str, Any] = field(default_factory=dict)
    """Options of the baseline, such as LoRA's rank."""
    is_alone: bool = False
    """Whether its runs train one after the other, so that the time and memory of each are measured."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], entry: str, changes: Mapping[str, Any], **others: Any) -> Case:
        """Make a case from a recipe's fields, some of them changed.

        Args:
            fields: the recipe fields that are set.
            entry: one of ``ENTRIES``, or empty.
            changes: values by field; ``options.name`` is one option, of a baseline where it has one of this name.
            others: the other fields of the case.

        Raises:
            ConfigError: the entry is unknown, or fields are incompatible; the message begins with the case's name.
        """
        own = _baseline_options(entry, changes)
        changes = {name: value for name, value in changes.items() if name not in {OPTION + option for option in own}}
        try:
            return cls(entry=entry, recipe=_recipe(fields, entry, changes), baseline_options=own, **others)
        except ConfigError as error:
            raise error.at(str(others["name"])) from error

    @property
    def store(self) -> ResultStore:
        """The experiment's folder."""
        return ResultStore(Path(self.recipe.output))

    @property
    def is_adapter(self) -> bool:
        """Whether the base model stays frozen, so that several adapters can train on it at once."""
        return self.entry not in BASELINES and self.entry not in PROMPTS

    @property
    def configuration(self) -> dict[str, Any]:
        """What distinguishes it from another case of the same name."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output", *OF_THE_MACHINE})
        own = {"baseline_options": self.baseline_options} if self.baseline_options else {}
        return {"entry": self.entry, "seeds": self.seeds, "recipe": recipe, "rows": self.rows, **own}

    @property
    def runs(self) -> list[Recipe]:
        """One recipe per seed, all on the same rows."""
        changes = [
            {
                "seed": self.recipe.seed + number * self.recipe.ensemble,
                "data_seed": self.recipe.rows_seed,
                "output": str(self.store.run_folder(self.name, number)),
            }
            for number in range(self.seeds)
        ]
        return [self.recipe.model_copy(update=change) for change in changes]

    def failed(self, error: Exception) -> list[Entry]:
        """Its results where it cannot be run."""
        reason = str(error).partition("\n")[0]
        return [Entry(name=self.name, at=self.at, outcomes=[], failure=reason, failed_by=type(error).__name__)]


def _baseline_options(entry: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the changes that are options of a baseline."""
    names = BASELINES[entry].options if entry in BASELINES else ()
    return {name: changes[OPTION + name] for name in names if OPTION + name in changes}


def _recipe(fields: Mapping[str, Any], entry: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of an entry, with some fields changed.

    Raises:
        ConfigError: the entry is unknown, or fields are incompatible.
    """
    if entry and entry not in ENTRIES:
        raise ConfigError(f"no entry {entry!r}", f"use some of {', '.join(ENTRIES)}")
    method, no_trunk = METHODS.get(entry, {}), {"trunk_cache": 0, "trunk_cache_disk": 0}
    if method and method["method"] != Recipe.from_fields(fields).method:
        fields = {**fields, "options": {}, "learning_rate": None, **no_trunk, **OF_A_START, **method}
    if entry in BASELINES:
        fields = {**fields, "learning_rate": BASELINES[entry].learning_rate, **no_trunk, **OF_A_START}
    recipe = Recipe.from_fields(with_changes(fields, changes))
    if method and recipe.method is not method["method"]:
        raise ConfigError(
            f"the entry is {entry} and the field method {recipe.method.value}", "leave one of the two out"
        )
    if entry in BASELINES and recipe.is_validated:  # the best step would be a copy of a whole model
        what = "eval_steps keeps the best of" if recipe.patience is None else "patience stops"
        raise ConfigError(f"{what} adapters, and not {entry}", "leave one of the two out")
    if recipe.push_to_hub:
        raise ConfigError("an experiment is not pushed", "set push_to_hub to false, and push an adapter by train")
    if entry not in METHODS and entry and recipe.ensemble > 1:
        raise ConfigError(
            f"an ensemble is of adapters, and not of {entry}", "set ensemble to 1, or leave the entry out"
        )
    return recipe


def with_changes(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields with some of them changed; ``options.name`` is one option."""
    changed = dict(fields)
    for name, value in changes.items():
        whole, _, part = name.partition(".")
        changed[whole] = {**(changed.get(whole) or {}), part: value} if part else value
    return changed
