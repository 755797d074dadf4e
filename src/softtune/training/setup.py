"""What a recipe names, loaded: rows, base model, adapters, and a Trainer for each of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from softtune import compat
from softtune.adapter import Adapter
from softtune.data import IGNORED, Collator, Example, LabelTask, Task, each_row
from softtune.errors import DataError
from softtune.evaluation.answers import fitted
from softtune.methods import TaskType
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.rows import check_every_label, fingerprints, split_rows, training_and_evaluation_rows
from softtune.training.trainer import AdapterTrainer, InterruptSaver, ProgressReporter, trackers, training_arguments

LABEL_NAMES = {TaskType.QUESTION_ANS: ["start_positions", "end_positions"]}
"""What a batch calls its labels, where it is not ``labels``."""

Progress = Callable[[str, int, int, str], None]
"""Told what is being done, how much of it is done, out of how much, and how it goes."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a recipe trains and evaluates on."""

    training: Dataset
    validation: Dataset
    """Held out of the training rows, to tell when to stop; empty where nothing does."""
    evaluation: Dataset | None
    fingerprints: dict[str, str]
    """What tells whether they are those of an earlier run."""

    @classmethod
    def of(cls, recipe: Recipe) -> Rows:
        """Load them. Raises DataError where a file or a row does not fit."""
        training, evaluation = training_and_evaluation_rows(recipe, recipe.definition)
        prints = fingerprints(recipe.definition, training, evaluation)
        validation = training.select([])
        if recipe.patience is not None:
            training, validation = split_rows(training, recipe.definition, recipe.validation_size, recipe.rows_seed)
        check_every_label(recipe.definition, training)
        return cls(training=training, validation=validation, evaluation=evaluation, fingerprints=prints)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a recipe names, loaded."""

    folder: RunFolder
    task: Task
    model: PeftModel
    """The base model with the recipe's adapters, all of them trained."""
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    examples: list[Example]
    """The training rows, encoded: one or several of each."""
    truncated: int
    """Training rows that were cut to fit."""
    validation: list[Example]
    """Rows that tell when to stop, encoded; none where nothing does."""
    progress: Progress

    @classmethod
    def of(cls, folder: RunFolder, rows: Rows, bases: Models, progress: Progress) -> Setup:
        """Load the base model, make its adapters, and encode the rows.

        Raises:
            ConfigError, UnsupportedModelError: the base model cannot do what the recipe asks for.
            DataError: a row does not fit the model, or its tokenizer does not tell two labels apart.
        """
        recipe = folder.recipe
        model, tokenizer = bases.adapted(recipe)
        if recipe.compile:
            model.backbone.compile_layers()
        if recipe.has_trunk_cache:  # refused before the base model is evaluated
            model.trunk_cache(recipe.trunk_cache, recipe.trunk_cache_disk)
        task = fitted(recipe.definition, model)
        columns = [*task.columns, task.label_column]
        training, validation = (
            each_row(part, columns, lambda row: task.examples(row, tokenizer))
            for part in (rows.training, rows.validation)
        )
        _check_labels(task, rows.training[0], tokenizer)
        return cls(
            folder=folder,
            task=task,
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            examples=[example for own in training for example in own],
            truncated=sum(any(example.truncated for example in own) for own in training),
            validation=[example for own in validation for example in own],
            progress=progress,
        )

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    def asks_as(self, other: Setup) -> bool:
        """Whether the base model alone is asked the same as for another recipe."""
        own, others = self.rows.fingerprints.get("evaluation"), other.rows.fingerprints.get("evaluation")
        return self.task == other.task and own == others and not self.task.kind.has_head

    def trainers(self, interrupt: InterruptSaver) -> list[AdapterTrainer]:
        """A Trainer for each adapter."""
        base, names = self.model.get_base_model(), self.recipe.adapter_names
        models = [PeftModel.of(base, {name: self.model.adapter(name)}) for name in names]
        return [self.trainer(*each, interrupt) for each in zip(models, names, range(len(names)), strict=True)]

    def trainer(self, model: PeftModel, name: str, number: int, interrupt: InterruptSaver) -> AdapterTrainer:
        """A Trainer for what is trained of a model.

        Args:
            model: the model.
            name: what is trained is called so.
            number: of an ensemble's member, from 0.
            interrupt: ends the training.
        """
        recipe = self.recipe
        phase = "training" if recipe.ensemble == 1 else f"training {name}"
        return AdapterTrainer(
            model,
            args=_arguments(recipe, self.folder.checkpoints(name), recipe.seed + number),
            train_dataset=self.examples,
            eval_dataset=self.validation or None,
            data_collator=Collator(int(self.tokenizer.pad_token_id), padding_side="left"),
            trunk_cache=recipe.trunk_cache / recipe.ensemble,
            trunk_cache_disk=recipe.trunk_cache_disk / recipe.ensemble,
            callbacks=[
                interrupt,
                *([EarlyStoppingCallback(recipe.patience)] if recipe.patience is not None else []),
                ProgressReporter(lambda *step: self.progress(phase, *step)),
                *trackers(recipe.report_to, self.folder.logs(name)),
            ],
        )


class Models(Protocol):
    """Makes what recipes train."""

    def adapted(self, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """A recipe's base model with what is trained, and its tokenizer."""
        ...


class BaseModels:
    """The base model of recipes that run at once, loaded once."""

    def __init__(self) -> None:
        self._first: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def adapted(self, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The base model with new adapters, each of which depends on nothing but its seed."""
        adapters: dict[str, Adapter] = {}
        for number, name in enumerate(recipe.adapter_names):
            set_seed(recipe.seed + number)
            base, _ = self._load(recipe)
            set_seed(recipe.seed + number)
            adapters[name] = PeftModel(base, recipe.config(), name).adapter(name)
        assert self._first is not None
        base, tokenizer = self._first
        return PeftModel.of(base, adapters), tokenizer

    def _load(self, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model; a new one where a head is drawn with it, a copy of which the adapter keeps."""
        if self._first is not None and recipe.num_labels is None:
            return self._first
        loaded = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
        self._first = self._first or loaded
        return loaded


def _check_labels(task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where two labels are the same tokens behind a record."""
    if not isinstance(task, LabelTask) or task.has_head:
        return
    labels: dict[tuple[int, ...], str] = {}
    for label in task.verbalizer.labels:
        answer = tuple(x for x in task.encode(record, tokenizer, label=label).labels if x != IGNORED)
        if (other := labels.setdefault(answer, label)) != label:
            raise DataError(f"labels {other!r} and {label!r} are the same tokens to the model: give them other words")


def _arguments(recipe: Recipe, folder: Path, seed: int) -> Any:
    return training_arguments(
        folder,
        learning_rate=recipe.peak_learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        save_steps=recipe.save_steps,
        bf16=recipe.bf16,
        seed=seed,
        label_names=LABEL_NAMES.get(recipe.task, ["labels"]),
        **{compat.spelled("activation_checkpointing"): recipe.gradient_checkpointing},
        **({} if recipe.patience is None else _stopping(recipe)),
    )


def _stopping(recipe: Recipe) -> dict[str, Any]:
    """Arguments of a Trainer that keeps the best checkpoint."""
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.save_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "prediction_loss_only": True,
    }
