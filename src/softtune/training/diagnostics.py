"""Profiling and a learning rate range test of a recipe's training, without writing any output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softtune.errors import ConfigError
from softtune.training.callbacks import InterruptSaver
from softtune.training.folder import RunFolder
from softtune.training.learning_rate import RangeTest, range_test
from softtune.training.profile import Profile, profile
from softtune.training.recipe import Recipe
from softtune.training.setup import BaseModels, Rows, Setup
from softtune.training.trainer import AdapterTrainer


def profile_recipe(recipe: Recipe) -> Profile:
    """Profile training steps of a recipe.

    Raises:
        ConfigError, DataError, TrainingError: as from ``train``; or the recipe trains an ensemble.
    """
    with _trainer_without_output(recipe) as trainer:
        return profile(trainer)


def find_learning_rate(recipe: Recipe) -> RangeTest:
    """Run a learning rate range test: the loss of a recipe's training at increasing learning rates.

    Raises:
        ConfigError, DataError: as from ``train``; or the recipe trains an ensemble.
        TrainingError: the loss is NaN or infinite from the beginning.
    """
    with _trainer_without_output(recipe) as trainer:
        return range_test(trainer)


@contextmanager
def _trainer_without_output(recipe: Recipe) -> Iterator[AdapterTrainer]:
    if recipe.ensemble > 1:
        raise ConfigError("one adapter's steps are measured", "set ensemble to 1")
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"output": folder, "report_to": [], "patience": None, "eval_steps": None}
        recipe = recipe.model_copy(update=changes)
        setup = Setup.prepare(RunFolder(recipe), Rows.load(recipe), BaseModels(), lambda *_: None)
        [trainer] = setup.trainers(InterruptSaver())
        yield trainer
