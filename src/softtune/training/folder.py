"""A run's output folder: empty, with the checkpoints of an unfinished run, or with the trained adapter.

Knows nothing about models but how to save one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softtune import storage
from softtune.errors import ConfigError, DataError
from softtune.model import PeftModel
from softtune.training import ranks
from softtune.training.recipe import CHECKPOINTS, RECIPE_NAME, Recipe, holds_adapter
from softtune.training.trainer import STATE_FILE, checkpoints_in, step_of

START_NAME = "start.json"
"""File with what a run started from: the metrics of the base model alone, and fingerprints of the data."""


ENTRIES_NAME = "entries"
"""Folder of an experiment's entries; a run has none."""
LOGS = "logs"
"""Folder of TensorBoard's files."""
HISTORY_NAME = "history.json"
"""File with the losses by step of each adapter of a finished run."""


class RunFolder:
    """The output folder of a recipe.

    Args:
        recipe: the recipe.
        checkpoint: name of the checkpoint to resume from, such as checkpoint-100; by default the newest.
    """

    def __init__(self, recipe: Recipe, checkpoint: str | None = None) -> None:
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.path = Path(recipe.output)

    def checkpoints(self, name: str = "default") -> Path:
        """Folder of an unfinished run's checkpoints, or of those of an ensemble's member."""
        return self._adapter_folder(self.path / CHECKPOINTS, name)

    def logs(self, name: str) -> Path:
        """Folder of an adapter's TensorBoard files."""
        return self._adapter_folder(self.path / LOGS, name)

    @property
    def starts(self) -> dict[str, str | None]:
        """The checkpoint that each adapter resumes from, by its name; None where there is none."""
        found = {name: self._to_resume_from(name) for name in self.recipe.adapter_names}
        return {name: str(paths[-1]) if paths else None for name, paths in found.items()}

    def _to_resume_from(self, name: str) -> list[Path]:
        """An adapter's checkpoints that can be resumed from, the newest last: all, or those of the given name."""
        return [c for c in checkpoints_in(self.checkpoints(name)) if self.checkpoint in (None, c.name)]

    @property
    def is_unfinished(self) -> bool:
        return not self._has_recipe and any(checkpoints_in(self.checkpoints(n)) for n in self.recipe.adapter_names)

    @property
    def is_finished(self) -> bool:
        return self._has_recipe or (holds_adapter(self.path) and not self.is_unfinished)

    @property
    def before(self) -> dict[str, float]:
        """The base model's metrics, as saved by an unfinished run."""
        metrics: dict[str, float] = self._start["before"]
        return metrics

    def begin(self, before: dict[str, float], fingerprints: dict[str, str]) -> None:
        """Save what a run starts from: its recipe, metrics of the base model alone, and fingerprints of the data."""
        with storage.staged(self.checkpoints()) as stage:
            self.recipe.save(stage / RECIPE_NAME)
            storage.write_json(stage / START_NAME, {"before": before, "data": fingerprints})

    def check_data(self, fingerprints: dict[str, str]) -> None:
        """Check that an unfinished run started with the same data.

        Raises:
            DataError: it started with other data.
        """
        for name, fingerprint in fingerprints.items():
            if fingerprint != self._start["data"][name]:
                raise DataError(
                    f"the {name} data is not what the run was started with",
                    f"restore it, or delete the folder {self.checkpoints()}",
                )

    def check_recipe(self) -> None:
        """Check that the folder's run has the same recipe.

        Raises:
            ConfigError: it has another one.
        """
        recipe_file = self.path / RECIPE_NAME if self.is_finished else self.checkpoints() / RECIPE_NAME
        for name, (now, then) in self.recipe.differences(Recipe.load(recipe_file)).items():
            raise ConfigError(
                f"{name} is {now!r}, and {then!r} in the run in {self.path}",
                "resume it with the recipe it was started with",
            )

    def check_checkpoint(self) -> None:
        """Check that an unfinished run has the checkpoint to resume from, and the best one until then.

        Raises:
            ConfigError: it has not.
        """
        for name, start in self.starts.items():
            if start is None:
                there = ", ".join(c.name for c in checkpoints_in(self.checkpoints(name))) or "none"
                raise ConfigError(f"{self.checkpoints(name)} has no {self.checkpoint}", f"it has {there}: name one")
            best = storage.read_json(Path(start, STATE_FILE)).get("best_model_checkpoint")
            if best is not None and not Path(best).is_dir():
                raise ConfigError(
                    f"{Path(best).name} was the best until {self.checkpoint}, and is gone",
                    "resume from a later checkpoint, and keep more by save_total_limit",
                )

    def drop_later(self) -> None:
        """Remove the checkpoints that come after the named one, since what they hold is trained again."""
        for name, start in self.starts.items():
            for later in checkpoints_in(self.checkpoints(name)) if self.checkpoint and start else ():
                if step_of(later) > step_of(Path(str(start))):
                    shutil.rmtree(later)

    def save(self, model: PeftModel, histories: Sequence[list[dict[str, float]]]) -> None:
        """Save the trained adapter, or an ensemble's members in folders of their own, and remove the checkpoints.

        All processes of a run call this, and the first one writes.

        The recipe is written last: a folder that has it is complete.

        Args:
            model: the base model with the trained adapters.
            histories: losses by step of each adapter.
        """
        model.save_pretrained(self.path, is_main_process=ranks.is_main_process())
        ranks.wait_for_everyone()  # who may still load the best checkpoint
        ranks.on_main_process(lambda: self._finish(histories))

    def _finish(self, histories: Sequence[list[dict[str, float]]]) -> None:
        with storage.staged(self.path) as stage:
            names = self.recipe.adapter_names
            storage.write_json(stage / HISTORY_NAME, dict(zip(names, histories, strict=True)))
        if self.recipe.ensemble > 1:
            for number, name in enumerate(self.recipe.adapter_names):
                _write_recipe(self.recipe.member(number, self.path / name))
        _write_recipe(self.recipe)
        shutil.rmtree(self.checkpoints(), ignore_errors=True)

    @property
    def kept(self) -> str:
        """What an aborted run has left in the folder, as a clause of a message."""
        if self.is_finished:
            return f"the adapter is saved in {self.path}"
        checkpoint = next(filter(None, self.starts.values()), None)
        return f"{checkpoint} is kept" if checkpoint else f"no checkpoint is kept in {self.path}"

    @property
    def _has_recipe(self) -> bool:
        return (self.path / RECIPE_NAME).is_file()

    @property
    def _start(self) -> dict[str, Any]:
        return storage.read_json(self.checkpoints() / START_NAME)

    @staticmethod
    def _adapter_folder(folder: Path, name: str) -> Path:
        return folder if name == "default" else folder / name


def check_folders(folders: Sequence[RunFolder], *, resume: bool) -> None:
    """Check that runs can start, or resume, without overwriting anything.

    Raises:
        ConfigError: a folder has a run or an experiment, or there is no run or checkpoint to resume, or it is another
            recipe's.
        CheckpointError: an output is a file, or cannot be written.
    """
    for folder in folders:
        storage.check_writable(folder.path)
        if (folder.path / ENTRIES_NAME).is_dir():
            raise ConfigError(f"{folder.path} has an experiment", "choose another output")
    finished = [folder for folder in folders if folder.is_finished]
    unfinished = [folder for folder in folders if folder.is_unfinished]
    if finished and (not resume or len(finished) == len(folders)):
        raise ConfigError(f"{finished[0].path} has a finished adapter", "choose another output or delete it")
    if unfinished and not resume:
        raise ConfigError(
            f"{unfinished[0].path} has an unfinished run",
            f"add --resume to go on, or delete the folder {unfinished[0].checkpoints()}",
        )
    if resume and not finished + unfinished:
        raise ConfigError(f"{folders[0].path} has no unfinished run", "leave out --resume")
    for folder in finished + unfinished:
        folder.check_recipe()
    for folder in unfinished:
        if folder.checkpoint is not None:
            folder.check_checkpoint()


def what_is_kept(folders: Sequence[RunFolder]) -> str:
    """What aborted runs have left in their folders, and how to resume, as a message."""
    kept = "; ".join(folder.kept for folder in folders)
    if all(folder.is_finished for folder in folders):
        return f"stopped before the evaluation; {kept}"
    begun = any(folder.is_finished or folder.is_unfinished for folder in folders)
    return f"stopped at once; {kept}: {'go on with --resume' if begun else 'start again'}"


def _write_recipe(recipe: Recipe) -> None:
    with storage.staged(recipe.output) as stage:
        recipe.save(stage / RECIPE_NAME)
