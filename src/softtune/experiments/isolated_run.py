"""Runs a recipe alone: an adapter whose time and memory are measured, or a baseline, which changes the base model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from softtune import checkpoint
from softtune.errors import TrainingError
from softtune.experiments.answering import metrics_of
from softtune.experiments.baselines import BASELINES, Baseline
from softtune.experiments.cases import Case
from softtune.experiments.memory import measured
from softtune.experiments.outcomes import Outcome
from softtune.methods.initialization import WEIGHTS_NAME
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.callbacks import InterruptSaver
from softtune.training.compatibility import check_compatible
from softtune.training.folder import RunFolder
from softtune.training.progress import Progress
from softtune.training.recipe import Recipe
from softtune.training.setup import BaseModels, Rows, Setup
from softtune.training.trainer import AdapterTrainer


class _Prepared:
    """Loads base models and prepares them for a baseline."""

    def __init__(self, baseline: Baseline, options: Mapping[str, Any]) -> None:
        self.baseline = baseline
        self.options = options

    def adapted(self, recipe: Recipe, training: Dataset) -> tuple[PeftModel, PreTrainedTokenizerBase, tuple[()]]:
        """See ``Models``."""
        set_seed(recipe.seed)
        base, tokenizer = load_base_model(
            recipe.model, recipe.task, num_labels=recipe.num_labels, options=recipe.load_options
        )
        model = PeftModel(base)
        self.baseline.prepare(base, **self.options)
        return model, tokenizer, ()


def run_isolated(case: Case, run: Recipe, progress: Progress) -> Outcome:
    """Run a recipe alone, and measure its time and memory. An adapter is saved, a changed base model is not."""
    check_compatible([run])
    clear(run)
    rows, baseline = Rows.load(run), BASELINES.get(case.entry)
    bases = _Prepared(baseline, case.baseline_options) if baseline else BaseModels()
    setup = Setup.prepare(RunFolder(run), rows, bases, progress)
    trainer = setup.trainer(setup.model, "default", 0, InterruptSaver())
    with setup.model.disable_adapter() if baseline else nullcontext():
        with nullcontext() if baseline else _saving(setup, trainer):
            seconds, memory = _costs(trainer)
        metrics = metrics_of(setup.model, setup.tokenizer, setup.task, rows, progress)
    if baseline:
        shutil.rmtree(setup.folder.path, ignore_errors=True)  # the Trainer creates it, and nothing is saved there
    trained, total = setup.model.get_nb_trainable_parameters()
    trained_bytes = sum(parameter.nbytes for parameter in setup.model.parameters() if parameter.requires_grad)
    return Outcome(
        metrics=metrics,
        trained=trained,
        total=total,
        stored=trained_bytes if baseline else stored(setup.folder.path),
        seconds=seconds,
        memory=memory,
        steps=trainer.state.global_step,
        training_rows=len(rows.training),
        evaluation_rows=len(rows.evaluation or ()),
    )


@contextmanager
def _saving(setup: Setup, trainer: AdapterTrainer) -> Iterator[None]:
    """Save the adapter after the block; after diverged training, its last good state, which the Trainer restored."""
    try:
        yield
    except TrainingError:
        setup.folder.save(setup.model, [trainer.history])
        raise
    setup.folder.save(setup.model, [trainer.history])


def _costs(trainer: AdapterTrainer) -> tuple[float, int]:
    """Train, with checkpoints only where early stopping needs them. Returns the seconds and the peak bytes in use."""
    if trainer.eval_dataset is None:
        trainer.args.save_strategy = "no"
    end, clock = measured(), time.perf_counter()
    try:
        trainer.train()
    finally:
        seconds, memory = time.perf_counter() - clock, end()
    return seconds, memory


def stored(folder: Path) -> int:
    """Bytes of the tensors of an adapter, or of an ensemble's adapters."""
    files = folder.rglob(WEIGHTS_NAME)
    return sum(tensor.nbytes for file in files for tensor in checkpoint.read(file).values())


def clear(run: Recipe) -> None:
    """Remove the folder of a run that was interrupted before its results were saved.

    Raises:
        ConfigError: the folder was made by another recipe.
    """
    folder = RunFolder(run)
    if folder.is_finished or folder.is_unfinished:
        folder.check_recipe()
        shutil.rmtree(folder.path)
