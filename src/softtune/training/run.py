"""Runs a recipe: data, base model, adapter, training, evaluation before and after, and the adapter's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState, set_seed

from softtune import storage
from softtune.data import Collator, Example, Task, each_row, load_records, sample_balanced, split_records
from softtune.data.sources import fingerprint
from softtune.errors import ConfigError, DataError, TrainingError
from softtune.evaluation.answers import answer, fitted, measure
from softtune.methods.base import CONFIG_NAME
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.recipe import CHECKPOINTS, RECIPE_NAME, Recipe
from softtune.training.trainer import (
    AdapterTrainer,
    InterruptSaver,
    ProgressReporter,
    last_checkpoint,
    training_arguments,
)

START_NAME = "start.json"
"""What a run began with: the metrics of the base model alone, and fingerprints of the data."""

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
        ConfigError: the recipe does not fit, an adapter or an unfinished run is in the way, or there is none to resume.
        CheckpointError: a file is in the way.
        DataError: the data does not fit.
        TrainingError: the loss is not a number; the adapter is saved as it was before.
        KeyboardInterrupt: Ctrl-C outside of training, or a second one; it says what is kept.
    """
    start = _checkpoint(recipe, resume)
    try:
        return _train(recipe, start, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(recipe)) from None


def _train(recipe: Recipe, start: str | None, progress: Progress) -> Report:
    run = _prepared(recipe, progress, resumes=start is not None)
    before = _begin(run, resumes=start is not None)
    state, seconds = _fit(run, start)
    finished = state.global_step >= state.max_steps
    after, evaluation_truncated = _finish(run) if finished else ({}, 0)
    trained, total = run.model.get_nb_trainable_parameters()
    return Report(
        finished=finished,
        steps=state.global_step,
        before=before,
        after=after,
        trained=trained,
        total=total,
        training_rows=len(run.examples),
        evaluation_rows=len(run.held_out or ()),
        truncated=sum(example.truncated > 0 for example in run.examples),
        evaluation_truncated=evaluation_truncated,
        folder=Path(recipe.output),
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a recipe names, loaded."""

    recipe: Recipe
    task: Task
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    """To train on."""
    held_out: Dataset | None
    """Rows to evaluate on."""
    data: dict[str, str]
    """Fingerprints of the rows to train and to evaluate on."""
    progress: Progress

    @property
    def checkpoints(self) -> Path:
        return Path(self.recipe.output) / CHECKPOINTS


def _checkpoint(recipe: Recipe, resume: bool) -> str | None:
    """The checkpoint to start from; an adapter is not overwritten, nor an unfinished run, or resumed by another
    recipe."""
    storage.check_no_file(recipe.output)
    folder = Path(recipe.output) / CHECKPOINTS
    found = last_checkpoint(folder)
    if found is None:
        if (Path(recipe.output) / CONFIG_NAME).is_file():
            raise ConfigError(f"{recipe.output} has a finished adapter: choose another output or delete it")
        if resume:
            raise ConfigError(f"{recipe.output} has no unfinished run: leave out --resume")
        return None
    if not resume:
        raise ConfigError(
            f"{recipe.output} has an unfinished run: add --resume to go on, or delete the folder {folder}"
        )
    for name, (now, then) in recipe.differences(Recipe.load(folder / RECIPE_NAME)).items():
        raise ConfigError(
            f"{name} is {now!r}, and {then!r} in the unfinished run: resume it with the recipe it was started with"
        )
    return found


def _kept(recipe: Recipe) -> str:
    """What there is of a run that was stopped at once."""
    if found := last_checkpoint(Path(recipe.output) / CHECKPOINTS):
        return f"stopped at once; {found} is kept: go on with --resume"
    if (Path(recipe.output) / CONFIG_NAME).is_file():
        return f"stopped before the adapter was evaluated; it is saved in {recipe.output}"
    return "stopped at once; no checkpoint is kept: start again"


def _prepared(recipe: Recipe, progress: Progress, *, resumes: bool) -> _Run:
    """Data first, since it is quick to be found wrong; then the base model with a new adapter."""
    task = recipe.definition
    training, held_out = _rows(recipe, task)
    data = _fingerprints(task, training, held_out)
    if resumes:
        _check_unchanged(recipe, data)
    set_seed(recipe.seed)  # a new head is drawn when the base model is loaded
    base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
    model = PeftModel(base, recipe.config())
    if recipe.trunk_cache or recipe.trunk_cache_disk:  # refused before the base model is evaluated
        model.trunk_cache(recipe.trunk_cache, recipe.trunk_cache_disk)
    task = fitted(task, model)
    return _Run(
        recipe=recipe,
        task=task,
        model=model,
        tokenizer=tokenizer,
        examples=each_row(training, task.template.fields, lambda r: task.encode(r, tokenizer, label=task.label_of(r))),
        held_out=held_out,
        data=data,
        progress=progress,
    )


def _rows(recipe: Recipe, task: Task) -> tuple[Dataset, Dataset | None]:
    """Training rows and, where there are any, evaluation rows."""
    rows = _labelled(task, recipe.train, recipe.train_split)
    held_out = None
    if recipe.evaluation is not None:
        held_out = _labelled(task, recipe.evaluation, recipe.evaluation_split)
    elif recipe.test_size:
        rows, held_out = split_records(rows, test_size=recipe.test_size, seed=recipe.seed)
    return rows if recipe.examples is None else _sample(recipe, rows, recipe.examples), held_out


def _labelled(task: Task, source: str, split: str) -> Dataset:
    """Records with texts and labels, checked while their rows still count as in the file."""
    rows = load_records(source, split=split)
    try:
        each_row(rows, [*task.template.fields, task.label_column], task.check)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return rows


def _fingerprints(task: Task, training: Dataset, held_out: Dataset | None) -> dict[str, str]:
    columns = [*task.template.fields, task.label_column]
    parts = {"training": training, "evaluation": held_out}
    return {name: fingerprint(rows, columns) for name, rows in parts.items() if rows is not None}


def _check_unchanged(recipe: Recipe, data: dict[str, str]) -> None:
    folder = Path(recipe.output) / CHECKPOINTS
    then = storage.read_json(folder / START_NAME)["data"]
    for name in data:
        if data[name] != then[name]:
            raise DataError(
                f"the {name} data is not what the run was started with: restore it, or delete the folder {folder}"
            )


def _sample(recipe: Recipe, rows: Dataset, size: int) -> Dataset:
    if size > len(rows):
        raise DataError(f"examples is {size} and there are {len(rows)} rows to train on: lower it or leave it out")
    if recipe.shares is None:
        return rows.shuffle(seed=recipe.seed).select(range(size))
    return sample_balanced(rows, column=recipe.label_column, size=size, seed=recipe.seed, shares=recipe.shares)


def _begin(run: _Run, *, resumes: bool) -> dict[str, float]:
    """Metrics of the base model alone; noted beside the recipe, where a resumed run finds them."""
    if resumes:
        before: dict[str, float] = storage.read_json(run.checkpoints / START_NAME)["before"]
        return before
    with run.model.disable_adapter():
        metrics, _ = _measured(run, "evaluating the base model")
    with storage.staged(run.checkpoints) as stage:
        run.recipe.save(stage / RECIPE_NAME)
        storage.write_json(stage / START_NAME, {"before": metrics, "data": run.data})
    return metrics


def _fit(run: _Run, start: str | None) -> tuple[TrainerState, float]:
    """Train; where the run ended, and the seconds that it took. A run that has to stop leaves the adapter's folder."""
    trainer = AdapterTrainer(
        run.model,
        args=_arguments(run.recipe, run.checkpoints),
        train_dataset=run.examples,
        data_collator=Collator(int(run.tokenizer.pad_token_id), padding_side="left"),
        trunk_cache=run.recipe.trunk_cache,
        trunk_cache_disk=run.recipe.trunk_cache_disk,
        callbacks=[interrupt := InterruptSaver(), ProgressReporter(lambda *step: run.progress("training", *step))],
    )
    clock = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=start)
    except TrainingError:
        _save(run)
        raise
    finally:
        interrupt.restore()
    return trainer.state, time.perf_counter() - clock


def _finish(run: _Run) -> tuple[dict[str, float], int]:
    """Save the adapter and evaluate it; see ``_measured``."""
    _save(run)
    return _measured(run, "evaluating")


def _save(run: _Run) -> None:
    """Write the adapter's folder, and remove what an unfinished run had kept."""
    run.model.save_pretrained(run.recipe.output)
    with storage.staged(run.recipe.output) as stage:
        run.recipe.save(stage / RECIPE_NAME)
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _measured(run: _Run, phase: str) -> tuple[dict[str, float], int]:
    """Metrics of the answers to the rows held out, and how many of these were cut to fit."""
    rows = run.held_out
    if not rows:
        return {}, 0
    run.progress(phase, 0, len(rows), None)
    answers = answer(
        run.model, run.tokenizer, run.task, rows, advance=lambda done: run.progress(phase, done, len(rows), None)
    )
    return measure(run.task, rows, answers), answers.truncated


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
