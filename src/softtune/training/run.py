"""Runs a recipe: data, base model, adapter, training, evaluation before and after, and the adapter's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from softtune import storage
from softtune.data import Collator, Task, each_row, load_records, sample_balanced, split_records
from softtune.data.sources import check_columns
from softtune.errors import ConfigError, TrainingError
from softtune.evaluation.answers import answer, fitted, measure
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.recipe import RECIPE_NAME, Recipe
from softtune.training.trainer import (
    AdapterTrainer,
    InterruptSaver,
    ProgressReporter,
    last_checkpoint,
    training_arguments,
)

CHECKPOINTS = "checkpoints"
"""Folder in the adapter's where an unfinished run keeps its state."""
BASELINE_NAME = "before.json"

Progress = Callable[[str, int, int, float | None], None]
"""Told what is being done, how much of it is done, out of how much, and the latest loss."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to."""

    finished: bool
    """False after an interrupt: the checkpoint waits for ``resume``."""
    steps: int
    before: dict[str, float]
    """Metrics of the base model alone on the evaluation rows; empty without such rows."""
    after: dict[str, float]
    """The same with the adapter; empty after an interrupt."""
    trained: int
    """Numbers that are trained."""
    total: int
    """All numbers, the base model's included."""
    training_rows: int
    evaluation_rows: int
    truncated: int
    """Training rows that were cut to fit."""
    evaluation_truncated: int
    """Evaluation rows that were cut to fit; 0 after an interrupt."""
    folder: Path
    seconds: float
    """Of training alone."""

    @property
    def size(self) -> int:
        """Bytes of the adapter's folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def train(recipe: Recipe, *, resume: bool = False, progress: Progress = lambda *_: None) -> Report:
    """Run a recipe.

    Args:
        recipe: what to do.
        resume: go on from the last checkpoint of an interrupted run of the same recipe.
        progress: told of every step.

    Raises:
        ConfigError: the recipe does not fit, an unfinished run is in the way, or there is none to resume.
        DataError: the data does not fit.
        TrainingError: the loss is not a number; the adapter is saved as it was before.
    """
    folder, task = Path(recipe.output), recipe.definition
    start = _checkpoint(folder / CHECKPOINTS, recipe, resume)
    training, held_out = _rows(recipe, task)
    set_seed(recipe.seed)  # a new head is drawn when the base model is loaded
    base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
    model = PeftModel(base, recipe.config())
    task = fitted(task, model)
    examples = each_row(training, task.template.fields, lambda r: task.encode(r, tokenizer, label=task.label_of(r)))
    before = _begin(recipe, task, model, tokenizer, held_out, progress, resumes=start is not None)
    trainer = AdapterTrainer(
        model,
        args=_arguments(recipe, folder / CHECKPOINTS),
        train_dataset=examples,
        data_collator=Collator(int(tokenizer.pad_token_id), padding_side="left"),
        callbacks=[interrupt := InterruptSaver(), ProgressReporter(lambda *step: progress("training", *step))],
    )
    clock = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=start)
    except TrainingError:
        _finish(model, recipe)
        raise
    finally:
        interrupt.restore()
    seconds = time.perf_counter() - clock
    finished = trainer.state.global_step >= trainer.state.max_steps
    after: dict[str, float] = {}
    cut = 0
    if finished:
        _finish(model, recipe)
        after, cut = _answers(model, tokenizer, task, held_out, progress, "evaluating")
    trained, total = model.get_nb_trainable_parameters()
    return Report(
        finished=finished,
        steps=trainer.state.global_step,
        before=before,
        after=after,
        trained=trained,
        total=total,
        training_rows=len(examples),
        evaluation_rows=len(held_out or ()),
        truncated=sum(example.truncated > 0 for example in examples),
        evaluation_truncated=cut,
        folder=folder,
        seconds=seconds,
    )


def _checkpoint(folder: Path, recipe: Recipe, resume: bool) -> str | None:
    """The checkpoint to start from; an unfinished run is neither overwritten nor resumed by another recipe."""
    found = last_checkpoint(folder)
    if found is None:
        if resume:
            raise ConfigError(f"{recipe.output} has no unfinished run: leave out --resume")
        return None
    if not resume:
        raise ConfigError(
            f"{recipe.output} has an unfinished run: add --resume to go on, or delete the folder {folder}"
        )
    if changed := recipe.differences(Recipe.load(folder / RECIPE_NAME)):
        raise ConfigError(f"the unfinished run has another {changed[0]}: resume it with the recipe it was started with")
    return found


def _rows(recipe: Recipe, task: Task) -> tuple[Dataset, Dataset | None]:
    """Training rows and, where there are any, evaluation rows."""
    rows = load_records(recipe.train, split=recipe.train_split)
    check_columns([*task.template.fields, task.label_column], rows.column_names)
    held_out = None
    if recipe.evaluation is not None:
        held_out = load_records(recipe.evaluation, split=recipe.evaluation_split)
        check_columns([*task.template.fields, task.label_column], held_out.column_names)
    elif recipe.test_size:
        rows, held_out = split_records(rows, test_size=recipe.test_size, seed=recipe.seed)
    if recipe.examples is not None and recipe.shares is not None:
        rows = sample_balanced(
            rows, column=task.label_column, size=recipe.examples, seed=recipe.seed, shares=recipe.shares
        )
    elif recipe.examples is not None:
        rows = rows.shuffle(seed=recipe.seed).select(range(min(recipe.examples, len(rows))))
    return rows, held_out


def _arguments(recipe: Recipe, folder: Path) -> Any:
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
        seed=recipe.seed,
    )


def _begin(
    recipe: Recipe,
    task: Task,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | None,
    progress: Progress,
    *,
    resumes: bool,
) -> dict[str, float]:
    """Metrics of the base model alone; noted beside the recipe, where a resumed run finds them."""
    folder = Path(recipe.output) / CHECKPOINTS
    if resumes:
        return storage.read_json(folder / BASELINE_NAME)
    with model.disable_adapter():
        metrics, _ = _answers(model, tokenizer, task, rows, progress, "evaluating the base model")
    with storage.staged(folder) as stage:
        recipe.save(stage / RECIPE_NAME)
        storage.write_json(stage / BASELINE_NAME, metrics)
    return metrics


def _answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset | None,
    progress: Progress,
    phase: str,
) -> tuple[dict[str, float], int]:
    """Metrics of the answers to the rows, and how many rows were cut to fit."""
    if not rows:
        return {}, 0
    progress(phase, 0, len(rows), None)
    answers = answer(model, tokenizer, task, rows, advance=lambda done: progress(phase, done, len(rows), None))
    return measure(task, rows, answers), answers.truncated


def _finish(model: PeftModel, recipe: Recipe) -> None:
    """Write the adapter's folder, and remove what an unfinished run had kept."""
    model.save_pretrained(recipe.output)
    with storage.staged(recipe.output) as stage:
        recipe.save(stage / RECIPE_NAME)
    shutil.rmtree(Path(recipe.output) / CHECKPOINTS, ignore_errors=True)
