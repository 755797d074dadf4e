"""Loading of trained adapters and reading of records, for the commands that use an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softtune import checkpoint
from softtune.data import load_records
from softtune.data.formats import SELF_NAMED, quoted
from softtune.errors import ConfigError, DataError
from softtune.evaluation.answers import fitted
from softtune.methods import PeftConfig
from softtune.model import PeftModel
from softtune.peft_types import TaskType
from softtune.pretrained import LoadOptions, load_base_model, name_here
from softtune.tasks import Task
from softtune.training.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """A trained adapter or ensemble, loaded on a base model."""

    recipe: Recipe
    task: Task
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def names(self) -> list[str]:
        """The names of the adapters: one, or the members of an ensemble."""
        return list(self.model.peft_config)


def load_trained(adapter: Path, model: str | None, **load: Any) -> Trained:
    """Load the adapter or ensemble that a recipe trained, on its base model or on ``model`` instead.

    The base model is loaded as the recipe says, but for the fields of ``LoadOptions`` in ``load``.
    """
    recipe = Recipe.from_adapter(adapter)
    other = {} if model in (None, recipe.model) else {"revision": None}
    options = recipe.inference_load_options(**{**other, **load})
    base, tokenizer = _load_base(model or recipe.model, recipe.model, recipe.task, options, recipe.num_labels)
    loaded = PeftModel(base).eval()
    for name in recipe.adapter_names:
        folder = adapter if name == "default" else adapter / name
        loaded.load_adapter(folder, name)
        checkpoint.warn_of_chat_template(folder, loaded.adapter(name), tokenizer)
    return Trained(recipe, fitted(recipe.definition, loaded), loaded, tokenizer)


def check_single(adapter: Path) -> None:
    """Check that a folder is no ensemble's.

    Raises:
        ConfigError: it has several adapters.
    """
    recipe = Recipe.found_in(adapter)
    if recipe is not None and recipe.ensemble > 1:
        one = adapter / recipe.adapter_names[0]
        raise ConfigError(f"{adapter} has {recipe.ensemble} adapters", f"name the folder of one, such as {one}")


def load_adapter(
    adapter: Path, model: str | None, config: PeftConfig, load: Mapping[str, Any]
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load any adapter, also one saved by PEFT, on the base model in its config or on ``model`` instead."""
    if Recipe.found_in(adapter) is not None:
        trained = load_trained(adapter, model, **load)
        return trained.model, trained.tokenizer
    saved = config.base_model_name_or_path
    trained_on = name_here(saved) if saved else None
    name = model or trained_on
    if name is None:
        raise ConfigError(f"{adapter} does not say its base model", "name it with --model")
    revision = {} if model else {"revision": config.revision}
    options = LoadOptions(**{**revision, **load})
    base, tokenizer = _load_base(name, trained_on, config.task_type or TaskType.CAUSAL_LM, options)
    return PeftModel.from_pretrained(base, adapter), tokenizer


def _load_base(
    name: str, trained_on: str | None, task: TaskType, options: LoadOptions, num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model ``name`` for an adapter that was trained on ``trained_on``."""
    try:
        return load_base_model(name, task, num_labels=num_labels, options=options)
    except ConfigError as error:
        if trained_on in (None, name):
            raise
        # The remedy is meant for a recipe.
        raise ConfigError(error.what, f"name the adapter's own with --model, {trained_on}, or a copy of it") from error


def read_records(recipe: Recipe, data: str | None, texts: list[str], split: str | None) -> Dataset:
    """Read the records of a file or hub data set, or make one of each text given on the command line.

    Raises:
        ConfigError: neither or both are given, a split is given with texts, or a record needs more than a text.
        DataError: the data cannot be read, or lacks a column that the template names.
    """
    if bool(data) == bool(texts):
        raise ConfigError("name a data file, or give --text; one of the two")
    if texts and split is not None:
        raise ConfigError("--split names a part of a data set, --text has none", "drop one of the two")
    fields = recipe.definition.columns
    if data:
        names = None if data.lower().endswith(SELF_NAMED) else recipe.columns
        records = load_records(data, split=split or "train", columns=names)
        if missing := [name for name in fields if name not in records.column_names]:
            raise DataError(
                f"the adapter reads the column {quoted(missing)}, which {data} lacks; it has "
                f"{quoted(records.column_names)}",
                "rename one of them",
            )
        return records
    if recipe.task is TaskType.TOKEN_CLS:
        raise ConfigError(f"--text is no list of words, which {recipe.output} tags", "give a data file")
    if len(fields) != 1:
        raise ConfigError(f"--text fills one field, the template has {', '.join(fields)}", "give a data file")
    return Dataset.from_dict({fields[0]: texts})
