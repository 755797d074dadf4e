"""Loads what a recipe names: rows, base model and adapters; and makes a Trainer for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from softtune import compat
from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.backbone.sharding import is_sharded
from softtune.data import Collator, Example
from softtune.data.chat import chat_template_of
from softtune.data.records import each_row
from softtune.errors import AdapterError
from softtune.evaluation.answers import Answers, answer, fitted, judge
from softtune.evaluation.ensemble import answer_each
from softtune.methods.initialization import fill
from softtune.model import PeftModel
from softtune.peft_types import PeftType, TaskType
from softtune.pretrained import load_base_model
from softtune.tasks import Task
from softtune.tasks.metrics import LOSS, direction
from softtune.tasks.texts import with_all_references
from softtune.training import ranks
from softtune.training.callbacks import EvaluationSaver, InterruptSaver, ProgressReporter, trackers
from softtune.training.context_tuning import Demonstrations, demonstrations, hides_own_tokens, starts_from_examples
from softtune.training.folder import RunFolder
from softtune.training.progress import TRAINING, Phase, Progress
from softtune.training.recipe import Recipe
from softtune.training.rows import check_every_label, fingerprints, split_rows, training_and_evaluation_rows
from softtune.training.trainer import AdapterTrainer, training_arguments

LABEL_NAMES = {TaskType.QUESTION_ANS: ["start_positions", "end_positions"]}
"""Keys of the labels in a batch, for tasks whose key is not ``labels``."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The data sets of a recipe."""

    training: Dataset
    validation: Dataset
    """Held out of the training rows to choose the best checkpoint by; empty without it."""
    evaluation: Dataset | None
    fingerprints: dict[str, str]
    """Hashes of the training and evaluation rows, to compare with those of an earlier run."""

    @classmethod
    def load(cls, recipe: Recipe) -> Rows:
        """Load the rows.

        Raises:
            DataError: a file or a row does not fit.
        """
        training, evaluation = training_and_evaluation_rows(recipe, recipe.definition)
        prints = fingerprints(recipe.definition, training, evaluation)
        validation = training.select([])
        if recipe.is_validated:
            training, validation = split_rows(training, recipe.definition, recipe.validation_size, recipe.rows_seed)
        check_every_label(recipe.definition, training)
        return cls(training=training, validation=validation, evaluation=evaluation, fingerprints=prints)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A recipe's loaded model, tokenizer and encoded rows."""

    folder: RunFolder
    task: Task
    model: PeftModel
    """The base model with the recipe's adapters, all of them trainable."""
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    examples: list[Example]
    """The training rows, encoded: one or several examples per row."""
    example_rows: list[int]
    """The number of each example's row."""
    truncated: int
    """Number of training rows that were truncated."""
    validation: list[Example]
    """The validation rows, encoded; empty without them."""
    progress: Progress
    starts: Sequence[Demonstrations] = field(default=())
    """What each adapter's prompt has started from, where that is training rows."""

    @classmethod
    def prepare(cls, folder: RunFolder, rows: Rows, bases: Models, progress: Progress) -> Setup:
        """Load the base model, create its adapters, and encode the rows.

        Raises:
            ConfigError, UnsupportedModelError: the base model does not support what the recipe sets.
            DataError: a row does not fit the model, or its tokenizer gives two labels the same tokens.
        """
        recipe = folder.recipe
        model, tokenizer, starts = bases.adapted(recipe, rows.training)
        if recipe.compile:
            model.backbone.compile_layers()
        if recipe.has_trunk_cache:  # raises before the base model is evaluated
            model.trunk_cache(recipe.trunk_cache, recipe.trunk_cache_disk)
        task = fitted(recipe.definition, model)
        columns = [*task.columns, task.label_column]
        training, validation = (
            each_row(part, columns, lambda row: task.examples(row, tokenizer))
            for part in (rows.training, rows.validation)
        )
        task.check_tokens(rows.training[0], tokenizer)
        return cls(
            folder=folder,
            task=task,
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            examples=[example for row_examples in training for example in row_examples],
            example_rows=[number for number, row_examples in enumerate(training) for _ in row_examples],
            truncated=sum(any(example.truncated for example in row_examples) for row_examples in training),
            validation=[example for row_examples in validation for example in row_examples],
            progress=progress,
            starts=starts,
        )

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    def asks_as(self, other: Setup) -> bool:
        """Whether evaluating before training has the same result for both recipes: same task and rows, no head, and no
        examples that a prompt starts from."""
        own, others = self.rows.fingerprints.get("evaluation"), other.rows.fingerprints.get("evaluation")
        is_alone = not (self.starts or other.starts or self.task.kind.has_head)
        return self.task == other.task and own == others and is_alone

    def trainers(self, interrupt: InterruptSaver) -> list[AdapterTrainer]:
        """Make a Trainer for each adapter."""
        base, names = self.model.get_base_model(), self.recipe.adapter_names
        models = [PeftModel.from_adapters(base, {name: self.model.adapter(name)}) for name in names]
        return [self.trainer(*each, interrupt) for each in zip(models, names, range(len(names)), strict=True)]

    def trainer(self, model: PeftModel, name: str, number: int, interrupt: InterruptSaver) -> AdapterTrainer:
        """Make a Trainer for a model with one adapter.

        Args:
            model: the base model with the adapter to train.
            name: the adapter's name, also of its folders for checkpoints and logs.
            number: index of the ensemble's member, from 0; added to the seed.
            interrupt: callback that ends the training on Ctrl-C.
        """
        recipe = self.recipe
        phase = TRAINING if recipe.ensemble == 1 else replace(TRAINING, member=name)
        return AdapterTrainer(
            model,
            args=_arguments(recipe, self.folder.checkpoints(name), recipe.seed + number, model.device),
            train_dataset=self._examples(number),
            eval_dataset=self.validation or None,
            data_collator=Collator(int(self.tokenizer.pad_token_id), padding_side="left"),
            trunk_cache=recipe.trunk_cache / recipe.ensemble,
            trunk_cache_disk=recipe.trunk_cache_disk / recipe.ensemble,
            group_by_length=recipe.group_by_length,
            measure=None if recipe.metric_for_best_model == LOSS else partial(self._measure, model),
            callbacks=[
                interrupt,
                *([EvaluationSaver()] if recipe.is_validated else []),
                *([EarlyStoppingCallback(recipe.patience)] if recipe.patience is not None else []),
                ProgressReporter(lambda *step: self.progress(phase, *step)),
                *trackers(recipe.report_to if ranks.is_main_process() else [], self.folder.logs(name)),
            ],
        )

    def _examples(self, number: int) -> list[Example]:
        """The training examples of an adapter, from which the virtual tokens that start from their rows are hidden."""
        if not (self.starts and hides_own_tokens(self.recipe)):
            return self.examples
        masks = self._prefix_masks(number)
        pairs = zip(self.examples, self.example_rows, strict=True)
        return [replace(example, prefix_mask=masks[row]) for example, row in pairs]

    def _prefix_masks(self, number: int) -> list[list[int] | None]:
        """For each training row the virtual tokens of an adapter that it sees."""
        return [self.starts[number].prefix_mask(row) for row in range(len(self.rows.training))]

    def evaluate_leave_one_out(self) -> dict[str, float]:
        """Measure the task on the training rows, from each of which the virtual tokens that start from it are hidden.

        Empty where none are hidden, there are other rows to evaluate on, or several adapters or texts to generate for
        it.
        """
        if not hides_own_tokens(self.recipe):
            return {}
        if self.rows.evaluation or self.task.num_new_tokens or len(self.starts) != 1:
            return {}
        rows, masks = self.rows.training, self._prefix_masks(0)
        answers = answer(self.model, self.tokenizer, self.task, rows, prefix_masks=masks)
        return judge(self.task, rows, answers).metrics

    def _measure(self, model: PeftModel) -> dict[str, float]:
        """The task's metrics of a model's adapter on the validation rows."""
        rows = self.rows.validation
        rows = with_all_references(rows, self.task) if self.task.merges_references else rows
        [answers] = self.answers(model, rows, model.active_adapters)
        return judge(self.task, rows, answers).metrics

    def answers(
        self, model: PeftModel, rows: Dataset, names: Sequence[str], phase: Phase | None = None
    ) -> list[Answers]:
        """Predict rows with each of several adapters; several processes share them, unless each must run all.

        Args:
            model: the model.
            rows: the rows.
            names: the adapters.
            phase: what is told to be done; by default nothing.

        Raises:
            AdapterError: an adapter's outputs contain NaN.
        """
        is_shared = not is_sharded(model)
        own = rows.select(ranks.part(len(rows))) if is_shared else rows
        total = len(names) * len(own)

        def advance(done: int) -> None:
            if phase is not None:
                self.progress(phase, done, total, "")

        advance(0)
        found: list[Answers] | AdapterError
        try:
            found = answer_each(model, self.tokenizer, self.task, own, names=names, advance=advance)
        except AdapterError as error:
            found = error
        every = ranks.all_gather(found) if is_shared else [found]
        for part in every:
            if isinstance(part, AdapterError):
                raise part
        return [Answers.joined(parts) for parts in zip(*every, strict=True)]


class Models(Protocol):
    """Loads base models and creates their adapters."""

    def adapted(
        self, recipe: Recipe, training: Dataset
    ) -> tuple[PeftModel, PreTrainedTokenizerBase, Sequence[Demonstrations]]:
        """Return a recipe's base model with its adapters, the tokenizer, and what the adapters start from; see
        ``Setup.starts``. ``training`` are the training rows."""
        ...


class BaseModels:
    """Loads the shared base model of recipes that run at once, and keeps it for all of them."""

    def __init__(self) -> None:
        self._first: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def adapted(
        self, recipe: Recipe, training: Dataset
    ) -> tuple[PeftModel, PreTrainedTokenizerBase, list[Demonstrations]]:
        """Return the base model with new adapters, each initialized from its own seed alone, the tokenizer, and what
        the adapters start from."""
        adapters: dict[str, Adapter] = {}
        starts: list[Demonstrations] = []
        for number, name in enumerate(recipe.adapter_names):
            set_seed(recipe.seed + number)
            base, tokenizer = self._load(recipe)
            options: dict[str, Any] = {}
            if starts_from_examples(recipe):
                positions, seed = Backbone.shared(base).max_positions, recipe.seed + number
                starts.append(demonstrations(recipe, recipe.definition, training, tokenizer, positions, seed=seed))
                options = starts[-1].options(recipe.method, recipe.options.get("num_virtual_tokens"))
            set_seed(recipe.seed + number)
            adapters[name] = PeftModel(base, recipe.config(**options), name).adapter(name)
            if starts and recipe.method is not PeftType.CPT:
                _begin_with(adapters[name], starts[-1], options["num_virtual_tokens"], base)
        assert self._first is not None
        base, tokenizer = self._first
        if recipe.uses_chat_template:
            for adapter in adapters.values():
                adapter.chat_template = chat_template_of(tokenizer)
        return PeftModel.from_adapters(base, adapters), tokenizer, starts

    def _load(self, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model and tokenizer; loaded anew where there is a head, so that each adapter has its own start."""
        if self._first is not None and recipe.num_labels is None:
            return self._first
        loaded = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels, options=recipe.load_options)
        self._first = self._first or loaded
        return loaded


def _begin_with(adapter: Adapter, start: Demonstrations, size: int, base: PreTrainedModel) -> None:
    """Set an adapter's ``size`` virtual tokens to the keys and values, or the token embeddings, of examples; repeated
    where these have fewer tokens."""
    ids = fill(start.input_ids, size)
    adapter.module.start_from(adapter.module.states_of_words(ids, Backbone.shared(base)))


def _arguments(recipe: Recipe, folder: Path, seed: int, device: torch.device) -> Any:
    optimiser: dict[str, Any] = {} if recipe.optim is None else {"optim": recipe.optim}
    return training_arguments(
        folder,
        device,
        learning_rate=recipe.peak_learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        label_smoothing_factor=recipe.label_smoothing_factor,
        dataloader_num_workers=recipe.dataloader_num_workers,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        bf16=recipe.bf16,
        seed=seed,
        label_names=LABEL_NAMES.get(recipe.task, ["labels"]),
        **optimiser,
        **{compat.spelled("activation_checkpointing"): recipe.gradient_checkpointing},
        **(_validation(recipe) if recipe.is_validated else {}),
    )


def _validation(recipe: Recipe) -> dict[str, Any]:
    """Trainer arguments for evaluations on the validation rows, which keep the best checkpoint."""
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps or recipe.save_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": recipe.metric_for_best_model,
        "greater_is_better": direction(recipe.metric_for_best_model) > 0,
        "prediction_loss_only": True,
    }
