"""The recipe: all settings of a training run, as YAML. It checks that its fields fit together.

The recipe is saved in the adapter's folder, so that prediction uses the same template and labels as training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from pydantic import model_validator

from softtune.data import Template
from softtune.errors import CheckpointError, ConfigError
from softtune.load_fields import LoadFields
from softtune.load_options import OF_THE_MACHINE
from softtune.methods import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from softtune.methods.base import CONFIG_NAME, config_class_of
from softtune.peft_types import TRAINED_TASKS, PeftType
from softtune.pretrained import LoadOptions
from softtune.tasks import Task
from softtune.tasks.metrics import LOSS
from softtune.training.auto_method import check_open, chosen_fields
from softtune.training.context_tuning import LEARNING_RATES, check_start, options_before, starts_from_examples
from softtune.training.fields import checked, read_fields, to_yaml
from softtune.training.recipe_fields import RecipeFields
from softtune.training.recipe_task import check_task, task_of
from softtune.training.validators import check_dependent_fields

RECIPE_NAME = "recipe.yaml"
CHECKPOINTS = "checkpoints"
"""Folder in the output where an unfinished run keeps its checkpoints."""

AUTO = "auto"
"""The method that is chosen by measured tasks, see ``training.auto_method``."""

NOT_PUSHED = {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": None}
"""The fields of an upload to the hub, as they are without one."""

NOT_OPTIONS = {
    "peft_type": "set method instead",
    "task_type": "set task instead",
    "inference_mode": "drop it, a recipe trains",
    "base_model_name_or_path": "set model instead",
    "revision": "drop it, and set the recipe's own revision",
}
"""Fields of the method's config that ``options`` may not have, and what to do instead."""

HINTS = {
    "task": f"use one of {', '.join(task.value for task in TRAINED_TASKS)}",
    "labels": "list texts, or name a text for each label, with quotes around numbers, yes, no, true and false",
    "test_size": "name a number of rows, or a share of them below 1",
    "validation_size": "name a number of rows of 1 or more, or a share of them between 0 and 1",
    "shares": "name each label's share, such as {spam: 0.3, ham: 0.7}",
    "train": "name a file or a hub data set, or list several",
    "messages": "name the column with conversations, or list those with prompt and completion",
    "device_map": "write auto, balanced, balanced_low_0 or sequential, or name a device for each module",
    "max_memory": "name each device's, such as {0: 20GiB, cpu: 60GiB}",
    "report_to": "list tensorboard, wandb or both, such as [tensorboard]",
}
"""What to write in fields of union or nested types, where pydantic's message names only its internal types."""

OPTIONS = {field.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in fields_of(config)}
"""Fields of the methods' configs."""


class Recipe(LoadFields, RecipeFields):
    """Settings of a training run."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        check_task(self)
        if self.evaluation in self.sources and self.evaluation_split == self.train_split:
            raise ValueError("evaluation names rows that are trained on: name others, or hold rows out by test_size")
        if twice := [label for label, count in Counter(list(self.labels or ())).items() if count > 1]:
            raise ValueError(f"labels has {twice[0]!r} more than once: list every label once")
        check_dependent_fields(self)
        if self.shots and (self.examples or not self.definition.label_set):
            raise ValueError("shots samples rows of each label: drop examples, and list labels of whole records")
        places, tokens = Template(self.template).num_virtual_tokens, self.options.get("num_virtual_tokens")
        if places and tokens not in (None, places):
            raise ValueError(f"the template has places for {places} virtual tokens, num_virtual_tokens is {tokens}")
        if places and self.options.get("placement") == "suffix":
            raise ValueError("the template says where virtual tokens stand: drop placement, or the template's places")
        if fixed := NOT_OPTIONS.keys() & self.options:
            raise ValueError(f"options has {min(fixed)}: {NOT_OPTIONS[min(fixed)]}")
        check_start(self)
        if self.compile and self.has_trunk_cache:
            raise ValueError("compile does not go with the trunk cache, which leaves layers out: drop one of the two")
        if self.seed + self.ensemble > 2**32:
            raise ValueError(f"seed is {self.seed}: leave {self.ensemble} seeds below 2**32 for the ensemble")
        if self.label_smoothing_factor and config_class_of(self.method).has_own_loss:
            raise ValueError(f"label_smoothing_factor is not for {self.method.value}, with a loss of its own: drop it")
        self.config()
        metrics = (LOSS, *self.definition.metrics)
        if self.metric_for_best_model not in metrics:
            raise ValueError(
                f"metric_for_best_model is {self.metric_for_best_model!r}: use one of {', '.join(metrics)}"
            )
        if places and not config_class_of(self.method).takes_placed_tokens:
            able = [kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.takes_placed_tokens]
            raise ValueError(f"only {' and '.join(able)} have virtual tokens that a template can place")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Load a recipe from a YAML file, with overrides for some of its fields.

        Raises:
            ConfigError: there is no such file, it is no YAML mapping, it is a sweep, or a field is unknown, missing or
                out of range.
        """
        fields = read_fields(path, "recipe")
        if "over" in fields:
            raise ConfigError(f"{path} is a sweep", "run it with softtune sweep")
        return cls.from_fields({**fields, **(overrides or {})})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Recipe:
        """Make a recipe of these fields. For ``method: auto`` its training rows are read, to choose by.

        Raises:
            ConfigError: a field is unknown, missing or out of range.
            DataError: the rows cannot be read.
        """
        if str(fields.get("method")).lower() == AUTO:
            check_open(fields)
            options = fields.get("options") or {}
            bare = {**fields, "method": PeftType.BITFIT, "options": {} if isinstance(options, Mapping) else options}
            fields = {**fields, **chosen_fields(cls.from_fields(bare), options)}
        misplaced = dict.fromkeys(OPTIONS - cls.model_fields.keys(), "put it into options")
        return checked(cls, fields, "recipe", {**misplaced, **NOT_OPTIONS, **HINTS})

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike[str]) -> Recipe:
        """Load the recipe that an adapter was trained with.

        Raises:
            CheckpointError: there is no such folder, its run is unfinished, or it has no recipe.
        """
        check_finished(folder)
        if (recipe := cls.found_in(folder)) is None:
            raise CheckpointError(
                f"{folder} has no {RECIPE_NAME}", "name the folder of an adapter that softtune trained"
            )
        return recipe

    @classmethod
    def found_in(cls, folder: str | os.PathLike[str]) -> Recipe | None:
        """Load the recipe in an adapter's folder; None if it has none, since softtune did not train the adapter."""
        file = Path(folder) / RECIPE_NAME
        return cls.load(file) if file.is_file() else None

    def save(self, path: Path) -> None:
        """Write all fields as YAML."""
        fields = self.model_dump(mode="json")
        path.write_text(to_yaml(fields), encoding="utf-8")

    @property
    def sources(self) -> list[str]:
        """The training data's files or hub data sets, as a list."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def load_options(self) -> LoadOptions:
        """How the base model is loaded for training."""
        return LoadOptions(**{name: getattr(self, name) for name in LoadFields.model_fields})

    def inference_load_options(self, **changes: Any) -> LoadOptions:
        """How the base model is loaded for the trained adapter: as for training, on any machine.

        Where the base model is, and whether its code may run, is for those to say who run it.

        Args:
            changes: fields of ``LoadOptions`` that replace the recipe's.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        kept = {*LoadFields.model_fields} - {*OF_THE_MACHINE, "trust_remote_code"}
        return LoadOptions(**{**{name: getattr(self, name) for name in kept}, **changes})

    @property
    def uses_chat_template(self) -> bool:
        return self.chat or self.messages is not None

    @property
    def has_trunk_cache(self) -> bool:
        return bool(self.trunk_cache or self.trunk_cache_disk)

    @property
    def rows_seed(self) -> int:
        """Seed of the sample and the held-out rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def member(self, number: int, output: Path) -> Recipe:
        """The recipe that trains one member of an ensemble alone; ``number`` counts from 0."""
        changes = {"ensemble": 1, "seed": self.seed + number, "data_seed": self.rows_seed, "output": str(output)}
        return self.model_copy(update={**changes, **NOT_PUSHED})

    @property
    def num_labels(self) -> int | None:
        """Number of classes of the trained classification head; None where there is none."""
        return len(self.labels) if self.labels and self.task.has_head else None

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields that differ between two recipes, with this one's value and the other's; without those that say on
        which device to run, or where to upload."""
        left_out = {*OF_THE_MACHINE, *NOT_PUSHED}
        own, others = (each.model_dump(mode="json", exclude=left_out) for each in (self, other))
        return {name: (own[name], others[name]) for name in own if own[name] != others[name]}

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters. An ensemble's are "1", "2" and so on, and are saved in folders of these names."""
        return ["default"] if self.ensemble == 1 else [str(i + 1) for i in range(self.ensemble)]

    def config(self, **options: Any) -> PeftConfig:
        """Build the method's config.

        Args:
            options: fields that replace those of the recipe's ``options``.

        Raises:
            ConfigError: ``options`` has an unknown key or a value out of range.
        """
        places = Template(self.template).num_virtual_tokens
        tokens = {"num_virtual_tokens": places} if places else {}
        base: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        base |= options_before(self)
        return PeftConfig.from_dict(
            {"peft_type": self.method, "task_type": self.task, **base, **tokens, **self.options, **options}
        )

    @property
    def peak_learning_rate(self) -> float:
        of_start = LEARNING_RATES.get(self.method) if starts_from_examples(self) else None
        return self.learning_rate or of_start or self.config().peak_learning_rate(self.task)

    @property
    def definition(self) -> Task:
        """The task that the recipe describes, for training and prediction."""
        return task_of(self)


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has an adapter or an ensemble."""
    return any((Path(folder) / name).is_file() for name in (CONFIG_NAME, RECIPE_NAME))


def check_finished(folder: str | os.PathLike[str]) -> None:
    """Check that a folder has no unfinished run.

    Raises:
        CheckpointError: there is no such folder, or it has only an unfinished run.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no folder {folder}", "check the path")
    if (Path(folder) / CHECKPOINTS).is_dir() and not holds_adapter(folder):
        raise CheckpointError(f"the run in {folder} is unfinished", "go on with softtune train --resume, or train anew")
