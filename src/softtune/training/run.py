"""Runs recipes: training, evaluation before and after, and the adapters' folders.

Recipes that share a base model run at once, and so do the members of an ensemble.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from softtune import storage
from softtune.acting import BASE
from softtune.errors import ConfigError, DataError, TrainingError
from softtune.evaluation.answers import Answers, measure
from softtune.evaluation.ensemble import answer_each, by_mean, by_vote
from softtune.training.learning_rate import RangeTest, range_test
from softtune.training.profile import Profile, profile
from softtune.training.recipe import RECIPE_NAME, Recipe, holds_adapter
from softtune.training.setup import BaseModels, Progress, Rows, Setup
from softtune.training.together import train_together
from softtune.training.trainer import AdapterTrainer, InterruptSaver, last_checkpoint

START_NAME = "start.json"
"""What a run began with: the metrics of the base model alone, and fingerprints of the data."""

SHARED = ("model", "task", "num_labels")
"""What recipes that run at once have in common."""

Starts = dict[str, str | None]
"""The checkpoint that each of a recipe's adapters goes on from, by its name; None where it begins."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of an adapter, or an ensemble of them, on the rows held out; empty without such rows."""

    metrics: dict[str, float] = field(default_factory=dict)
    """An ensemble's are those of its members' mean probability, or of their vote where they write texts."""
    members: list[dict[str, float]] = field(default_factory=list)
    """Those of each adapter of an ensemble; empty where there is only one."""
    vote: dict[str, float] = field(default_factory=dict)
    """Those of the majority of an ensemble's members; empty where there is only one."""
    truncated: int = 0
    """Rows that were cut to fit."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to."""

    finished: bool
    """False after an interrupt: the checkpoint waits for ``resume``."""
    steps: int
    before: dict[str, float]
    """Metrics of the base model alone on the evaluation rows; empty without such rows."""
    evaluation: Evaluation
    """The same with what was trained; empty after an interrupt."""
    trained: int
    """Numbers that are trained."""
    total: int
    """All numbers, the base model's included."""
    training_rows: int
    validation_rows: int
    """Held out of the training rows, to tell when to stop."""
    evaluation_rows: int
    truncated: int
    """Training rows that were cut to fit."""
    folder: Path
    seconds: float
    """Of training alone, with all that ran at once."""

    @property
    def after(self) -> dict[str, float]:
        """Metrics with what was trained."""
        return self.evaluation.metrics

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
    [result] = train_all([recipe], resume=resume, progress=progress)
    if isinstance(result, TrainingError):
        raise result
    return result


def train_all(
    recipes: Sequence[Recipe], *, resume: bool = False, progress: Progress = lambda *_: None
) -> list[Report | TrainingError]:
    """Run recipes that share a base model at once; each comes out as it would alone.

    Args:
        recipes: what to do.
        resume: go on from the last checkpoints of an interrupted run of the same recipes.
        progress: told of every step of each run.

    Returns:
        For each recipe what it came to, or why it failed while the others went on.

    Raises:
        ConfigError: as from ``train``, or two recipes differ in base model, task or classes, or have one output.
        CheckpointError, DataError, KeyboardInterrupt: as from ``train``.
    """
    _check_company(recipes)
    starts = [_starts(recipe, resume) for recipe in recipes]
    try:
        return _train(recipes, starts, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; ".join(map(_kept, recipes))) from None


def profile_recipe(recipe: Recipe) -> Profile:
    """Measure steps of a recipe's training, and leave nothing behind.

    Raises:
        ConfigError, DataError: as from ``train``; or the recipe trains an ensemble.
    """
    with _trainer_without_output(recipe) as trainer:
        return profile(trainer)


def find_learning_rate(recipe: Recipe) -> RangeTest:
    """Look how the loss of a recipe's training takes ever higher learning rates, and leave nothing behind.

    Raises:
        ConfigError, DataError: as from ``train``; or the recipe trains an ensemble.
    """
    with _trainer_without_output(recipe) as trainer:
        return range_test(trainer)


@contextmanager
def _trainer_without_output(recipe: Recipe) -> Iterator[AdapterTrainer]:
    if recipe.ensemble > 1:
        raise ConfigError("one adapter's steps are measured: set ensemble to 1")
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.model_copy(update={"output": folder, "report_to": [], "patience": None})
        setup = Setup.of(recipe, Rows.of(recipe), BaseModels(), lambda *_: None)
        [trainer] = setup.trainers(InterruptSaver())
        yield trainer


def _train(recipes: Sequence[Recipe], starts: Sequence[Starts], progress: Progress) -> list[Report | TrainingError]:
    """Data first, since it is quick to be found wrong."""
    rows = [Rows.of(recipe) for recipe in recipes]
    for recipe, own, start in zip(recipes, rows, starts, strict=True):
        if any(start.values()):
            _check_unchanged(recipe, own)
    bases, several = BaseModels(), len(recipes) > 1
    setups = [
        Setup.of(recipe, own, bases, _of_recipe(progress, recipe) if several else progress)
        for recipe, own in zip(recipes, rows, strict=True)
    ]
    befores: list[dict[str, float]] = []
    for setup, start in zip(setups, starts, strict=True):
        alike = (b for s, b in zip(setups, befores, strict=False) if s.asks_as(setup))
        befores.append(_begin(setup, next(alike, None), resumes=any(start.values())))
    fits = _fit(setups, starts)
    return [_result(setup, before, fit) for setup, before, fit in zip(setups, befores, fits, strict=True)]


def _of_recipe(progress: Progress, recipe: Recipe) -> Progress:
    """One of several recipes' progress."""
    return lambda phase, *step: progress(f"{Path(recipe.output).name}: {phase}", *step)


def _check_company(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that cannot run at once."""
    if len(recipes) > 1 and any("wandb" in recipe.report_to for recipe in recipes):
        raise ConfigError("wandb takes one run of a process: report several to tensorboard")
    outputs = Counter(str(Path(recipe.output).resolve()) for recipe in recipes)
    if twice := [output for output, count in outputs.items() if count > 1]:
        raise ConfigError(f"{twice[0]} is the output of {outputs[twice[0]]} recipes: give each one its own")
    for recipe in recipes:
        for name in SHARED:
            if (own := getattr(recipe, name)) != (other := getattr(recipes[0], name)):
                raise ConfigError(
                    f"{name} is {other!r} for {recipes[0].output} and {own!r} for {recipe.output}: recipes that run "
                    "at once share it, run these one after the other"
                )


def _starts(recipe: Recipe, resume: bool) -> Starts:
    """The checkpoints to start from; an adapter is not overwritten, nor an unfinished run, or resumed by another
    recipe."""
    storage.check_no_file(recipe.output)
    folder = recipe.checkpoints()
    starts = {name: last_checkpoint(recipe.checkpoints(name)) for name in recipe.adapter_names}
    if not any(starts.values()):
        if holds_adapter(recipe.output):
            raise ConfigError(f"{recipe.output} has a finished adapter: choose another output or delete it")
        if resume:
            raise ConfigError(f"{recipe.output} has no unfinished run: leave out --resume")
        return starts
    if not resume:
        raise ConfigError(
            f"{recipe.output} has an unfinished run: add --resume to go on, or delete the folder {folder}"
        )
    for name, (now, then) in recipe.differences(Recipe.load(folder / RECIPE_NAME)).items():
        raise ConfigError(
            f"{name} is {now!r}, and {then!r} in the unfinished run: resume it with the recipe it was started with"
        )
    return starts


def _kept(recipe: Recipe) -> str:
    """What there is of a run that was stopped at once."""
    checkpoints = (last_checkpoint(recipe.checkpoints(name)) for name in recipe.adapter_names)
    if found := next(filter(None, checkpoints), None):
        return f"stopped at once; {found} is kept: go on with --resume"
    if holds_adapter(recipe.output):
        return f"stopped before the adapter was evaluated; it is saved in {recipe.output}"
    return "stopped at once; no checkpoint is kept: start again"


def _check_unchanged(recipe: Recipe, rows: Rows) -> None:
    then = storage.read_json(recipe.checkpoints() / START_NAME)["data"]
    for name, fingerprint in rows.fingerprints.items():
        if fingerprint != then[name]:
            raise DataError(
                f"the {name} data is not what the run was started with: restore it, or delete the folder "
                f"{recipe.checkpoints()}"
            )


def _begin(setup: Setup, known: dict[str, float] | None, *, resumes: bool) -> dict[str, float]:
    """Metrics of the base model alone, unless they are known; noted beside the recipe, where a resumed run finds
    them."""
    recipe = setup.recipe
    if resumes:
        before: dict[str, float] = storage.read_json(recipe.checkpoints() / START_NAME)["before"]
        return before
    metrics = known or {}
    if setup.rows.evaluation and not known:
        [answers] = _answers(setup, "evaluating the base model", [BASE])
        metrics = _measured(setup, answers)
    with storage.staged(recipe.checkpoints()) as stage:
        recipe.save(stage / RECIPE_NAME)
        storage.write_json(stage / START_NAME, {"before": metrics, "data": setup.rows.fingerprints})
    return metrics


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How a recipe's training ended."""

    steps: int
    interrupted: bool
    error: TrainingError | None
    seconds: float


def _fit(setups: Sequence[Setup], starts: Sequence[Starts]) -> list[_Fit]:
    """Train all adapters of all recipes."""
    interrupt = InterruptSaver()
    own = [setup.trainers(interrupt) for setup in setups]
    trainers = [trainer for each in own for trainer in each]
    clock = time.perf_counter()
    with interrupt:
        errors = _errors(trainers, [start for each in starts for start in each.values()])
    seconds = time.perf_counter() - clock
    failed = dict(zip(trainers, errors, strict=True))
    ends = [trainer.state.global_step >= trainer.state.max_steps for trainer in trainers if not failed[trainer]]
    return [
        _Fit(
            steps=max(trainer.state.global_step for trainer in each),
            interrupted=interrupt.interrupted and not all(ends),
            error=next((failed[trainer] for trainer in each if failed[trainer]), None),
            seconds=seconds,
        )
        for each in own
    ]


def _errors(trainers: Sequence[AdapterTrainer], starts: Sequence[str | None]) -> list[TrainingError | None]:
    if len(trainers) > 1:
        return train_together(trainers, starts)
    try:
        trainers[0].train(resume_from_checkpoint=starts[0])
    except TrainingError as error:
        return [error]
    return [None]


def _result(setup: Setup, before: dict[str, float], fit: _Fit) -> Report | TrainingError:
    """Save and evaluate what was trained, unless it is still to go on. A run that had to stop leaves its folder too."""
    if fit.error is not None or not fit.interrupted:
        _save(setup)
    if fit.error is not None:
        return fit.error
    trained, total = setup.model.get_nb_trainable_parameters()
    return Report(
        finished=not fit.interrupted,
        steps=fit.steps,
        before=before,
        evaluation=Evaluation() if fit.interrupted else _evaluated(setup),
        trained=trained,
        total=total,
        training_rows=len(setup.examples),
        validation_rows=len(setup.validation),
        evaluation_rows=len(setup.rows.evaluation or ()),
        truncated=sum(example.truncated > 0 for example in setup.examples),
        folder=Path(setup.recipe.output),
        seconds=fit.seconds,
    )


def _save(setup: Setup) -> None:
    """Write the adapter's folder, and those of an ensemble's members in it, and remove what an unfinished run had
    kept."""
    recipe = setup.recipe
    setup.model.save_pretrained(recipe.output)
    members = {str(Path(recipe.output, name)): 1 for name in recipe.adapter_names if recipe.ensemble > 1}
    for folder, size in {**members, recipe.output: recipe.ensemble}.items():
        with storage.staged(folder) as stage:
            recipe.model_copy(update={"output": folder, "ensemble": size}).save(stage / RECIPE_NAME)
    shutil.rmtree(recipe.checkpoints(), ignore_errors=True)


def _evaluated(setup: Setup) -> Evaluation:
    """Metrics of each adapter, and of an ensemble of them."""
    if not setup.rows.evaluation:
        return Evaluation()
    members = _answers(setup, "evaluating", setup.recipe.adapter_names)
    truncated = members[0].truncated
    if len(members) == 1:
        return Evaluation(metrics=_measured(setup, members[0]), truncated=truncated)
    vote = _measured(setup, by_vote(setup.task, members))
    metrics = vote if members[0].scores is None else _measured(setup, by_mean(setup.task, members))
    return Evaluation(metrics=metrics, members=[_measured(setup, m) for m in members], vote=vote, truncated=truncated)


def _answers(setup: Setup, phase: str, names: Sequence[str]) -> list[Answers]:
    """What each of these adapters answers to the rows held out."""
    rows = setup.rows.evaluation
    assert rows is not None
    total = len(names) * len(rows)
    setup.progress(phase, 0, total, "")
    return answer_each(
        setup.model,
        setup.tokenizer,
        setup.task,
        rows,
        names=names,
        advance=lambda done: setup.progress(phase, done, total, ""),
    )


def _measured(setup: Setup, answers: Answers) -> dict[str, float]:
    assert setup.rows.evaluation is not None
    return measure(setup.task, setup.rows.evaluation, answers)
