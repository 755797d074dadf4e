"""What the commands share that work with a trained adapter: load it, read the records it is asked about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softtune.data import Task, load_records
from softtune.data.formats import SELF_NAMED, quoted
from softtune.errors import ConfigError, DataError
from softtune.evaluation.answers import fitted
from softtune.methods import PeftConfig, TaskType
from softtune.model import PeftModel
from softtune.pretrained import load_base_model, name_here
from softtune.training.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """An adapter at work, or an ensemble."""

    recipe: Recipe
    task: Task
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def names(self) -> list[str]:
        """The adapters by name: one, or the members of an ensemble."""
        return list(self.model.peft_config)


def load_trained(adapter: Path, model: str | None) -> Trained:
    """What a recipe made, on its base model or on the one named instead."""
    recipe = Recipe.of_adapter(adapter)
    base, tokenizer = _load_base(model or recipe.model, recipe.model, recipe.task, recipe.num_labels)
    loaded = PeftModel(base).eval()
    for name in recipe.adapter_names:
        loaded.load_adapter(adapter if name == "default" else adapter / name, name)
    return Trained(recipe, fitted(recipe.definition, loaded), loaded, tokenizer)


def check_single(adapter: Path) -> None:
    """Raise ConfigError where a recipe made an ensemble."""
    recipe = Recipe.found_in(adapter)
    if recipe is not None and recipe.ensemble > 1:
        one = adapter / recipe.adapter_names[0]
        raise ConfigError(f"{adapter} has {recipe.ensemble} adapters: name the folder of one, such as {one}")


def load_adapter(adapter: Path, model: str | None, config: PeftConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Any adapter, one that PEFT wrote too, on the base model that it names or on the one named instead."""
    if Recipe.found_in(adapter) is not None:
        trained = load_trained(adapter, model)
        return trained.model, trained.tokenizer
    saved = config.base_model_name_or_path
    own = name_here(saved) if saved else None
    name = model or own
    if name is None:
        raise ConfigError(f"{adapter} does not say its base model: name it with --model")
    base, tokenizer = _load_base(name, own, config.task_type or TaskType.CAUSAL_LM)
    return PeftModel.from_pretrained(base, adapter), tokenizer


def _load_base(
    name: str, own: str | None, task: TaskType, num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model, an adapter's own or another."""
    try:
        return load_base_model(name, task, num_labels=num_labels)
    except ConfigError as error:
        if own in (None, name):
            raise
        what = re.split(": (?=use |check )", str(error))[0]  # the remedy there is for a recipe
        raise ConfigError(f"{what}: name the adapter's own with --model, {own}, or a copy of it") from error


def read_records(recipe: Recipe, data: str | None, texts: list[str], split: str | None) -> Dataset:
    """Records of a file or hub name, or one for each text given on the command line.

    Raises:
        ConfigError: there are neither or both, a split of texts, or a text alone is no record.
        DataError: the data cannot be read, or lacks a column that the template names.
    """
    if bool(data) == bool(texts):
        raise ConfigError("name a data file, or give --text; one of the two")
    if texts and split is not None:
        raise ConfigError("--split names a part of a data set, --text has none: drop one of the two")
    fields = recipe.definition.columns
    if data:
        names = None if data.lower().endswith(SELF_NAMED) else recipe.columns
        records = load_records(data, split=split or "train", columns=names)
        if missing := [name for name in fields if name not in records.column_names]:
            raise DataError(
                f"the adapter reads the column {quoted(missing)}, which {data} lacks; it has "
                f"{quoted(records.column_names)}: rename one of them"
            )
        return records
    if recipe.task is TaskType.TOKEN_CLS:
        raise ConfigError(f"--text is no list of words, which {recipe.output} tags: give a data file")
    if len(fields) != 1:
        raise ConfigError(f"--text fills one field, the template has {', '.join(fields)}: give a data file")
    return Dataset.from_dict({fields[0]: texts})
