"""Runs recipes: training, evaluation before and after.

Recipes that share a base model run at once, and so do the members of an ensemble.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softtune.errors import AdapterError, TrainingError
from softtune.evaluation.answers import Answers, judge
from softtune.evaluation.ensemble import answer_each, by_mean, by_vote
from softtune.evaluation.metrics import Quality
from softtune.injection.owners import BASE
from softtune.training.company import check_company
from softtune.training.folder import RunFolder, check_folders, what_is_kept
from softtune.training.recipe import Recipe
from softtune.training.report import Evaluation, Report
from softtune.training.setup import BaseModels, Progress, Rows, Setup
from softtune.training.together import train_together
from softtune.training.trainer import AdapterTrainer, InterruptSaver

Result = Report | TrainingError
"""What a recipe came to, or why it failed while the others went on."""


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
        TrainingError: the loss or the adapter is no number; the adapter is saved as it was before.
        KeyboardInterrupt: Ctrl-C outside of training, or a second one; it says what is kept.
    """
    [result] = train_all([recipe], resume=resume, progress=progress)
    if isinstance(result, TrainingError):
        raise result
    assert result is not None
    return result


def train_all(
    recipes: Sequence[Recipe],
    *,
    resume: bool = False,
    before: bool = True,
    progress: Progress = lambda *_: None,
) -> list[Result | None]:
    """Run recipes that share a base model at once; each comes out as it would alone.

    Args:
        recipes: what to do.
        resume: go on from the last checkpoints of an interrupted run of the same recipes; those without one begin, and
            those that are finished are left as they are.
        before: evaluate the base model alone, too.
        progress: told of every step of each run.

    Returns:
        For each recipe what it came to, or why it failed while the others went on; None where it was finished before.

    Raises:
        ConfigError: as from ``train``, or two recipes differ in what they share, or have one output.
        CheckpointError, DataError, KeyboardInterrupt: as from ``train``.
    """
    check_company(recipes)
    folders = [RunFolder(recipe) for recipe in recipes]
    check_folders(folders, resume=resume)
    left = [folder for folder in folders if not folder.is_finished]
    try:
        results = dict(zip(left, _train(left, before, progress), strict=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_kept(folders)) from None
    return [results.get(folder) for folder in folders]


def _train(folders: Sequence[RunFolder], before: bool, progress: Progress) -> list[Result]:
    """Data first, since it is quick to be found wrong."""
    rows = [Rows.of(folder.recipe) for folder in folders]
    for folder, own in zip(folders, rows, strict=True):
        if folder.is_unfinished:
            folder.check_data(own.fingerprints)
    bases, several = BaseModels(), len(folders) > 1
    setups = [
        Setup.of(folder, own, bases, _of_recipe(progress, folder.recipe) if several else progress)
        for folder, own in zip(folders, rows, strict=True)
    ]
    befores: list[dict[str, float]] = []
    for setup in setups:
        alike = (b for s, b in zip(setups, befores, strict=False) if s.asks_as(setup))
        befores.append(_begin(setup, next(alike, None) if before else {}))
    fits = _fit(setups)
    for setup, fit in zip(setups, fits, strict=True):
        if fit.finished:
            setup.folder.save(setup.model, fit.histories)
    return [_result(setup, before, fit) for setup, before, fit in zip(setups, befores, fits, strict=True)]


def _of_recipe(progress: Progress, recipe: Recipe) -> Progress:
    """One of several recipes' progress."""
    return lambda phase, *step: progress(f"{Path(recipe.output).name}: {phase}", *step)


def _begin(setup: Setup, known: dict[str, float] | None) -> dict[str, float]:
    """Metrics of the base model alone, unless they are known or not wanted; noted where a resumed run finds them."""
    if setup.folder.is_unfinished:
        return setup.folder.before
    metrics = known or {}
    if setup.rows.evaluation and known is None:
        [answers] = _answers(setup, "evaluating the base model", [BASE])
        metrics = _judged(setup, answers).metrics
    setup.folder.begin(metrics, setup.rows.fingerprints)
    return metrics


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How a recipe's training ended."""

    steps: int
    finished: bool
    """Whether nothing is left to do, not even by an adapter that did not fail beside one that did."""
    error: TrainingError | None
    """Why it failed."""
    seconds: float
    best_steps: list[int]
    """See ``Report``."""
    histories: list[list[dict[str, float]]]
    """What each adapter's steps came to."""


def _fit(setups: Sequence[Setup]) -> list[_Fit]:
    """Train all adapters of all recipes."""
    interrupt = InterruptSaver()
    own = [setup.trainers(interrupt) for setup in setups]
    trainers = [trainer for each in own for trainer in each]
    starts = [start for setup in setups for start in setup.folder.starts.values()]
    clock = time.perf_counter()
    with interrupt:
        errors = _errors(trainers, starts)
    seconds = time.perf_counter() - clock
    failed = {trainer: error for trainer, error in zip(trainers, errors, strict=True) if error is not None}
    interrupted = interrupt.interrupted and not all(t in failed or t.has_ended for t in trainers)
    return [_fit_of(each, failed, interrupted, seconds) for each in own]


def _fit_of(
    trainers: Sequence[AdapterTrainer],
    failed: Mapping[AdapterTrainer, TrainingError],
    interrupted: bool,
    seconds: float,
) -> _Fit:
    """How the training of one recipe's adapters ended, of which some may have failed."""
    error = next((failed[trainer] for trainer in trainers if trainer in failed), None)
    has_ended = error is not None and all(t in failed or t.has_ended for t in trainers)
    return _Fit(
        steps=max(trainer.state.global_step for trainer in trainers),
        finished=has_ended or not interrupted,
        error=error,
        seconds=seconds,
        best_steps=[step for trainer in trainers if (step := trainer.state.best_global_step) is not None],
        histories=[trainer.history for trainer in trainers],
    )


def _errors(trainers: Sequence[AdapterTrainer], starts: Sequence[str | None]) -> list[TrainingError | None]:
    if len(trainers) > 1:
        return train_together(trainers, starts)
    try:
        trainers[0].train(resume_from_checkpoint=starts[0])
    except TrainingError as error:
        return [error]
    return [None]


def _result(setup: Setup, before: dict[str, float], fit: _Fit) -> Result:
    """Evaluate what was trained, unless it is still to go on."""
    if fit.finished and fit.error is not None:
        return fit.error
    try:
        evaluation = _evaluated(setup) if fit.finished else Evaluation()
    except AdapterError as error:
        return TrainingError(str(error))
    trained, total = setup.model.get_nb_trainable_parameters()
    return Report(
        finished=fit.finished,
        steps=fit.steps,
        before=before,
        evaluation=evaluation,
        trained=trained,
        total=total,
        training_rows=len(setup.rows.training),
        validation_rows=len(setup.rows.validation),
        best_steps=fit.best_steps,
        evaluation_rows=len(setup.rows.evaluation or ()),
        truncated=setup.truncated,
        folder=setup.folder.path,
        seconds=fit.seconds,
    )


def _evaluated(setup: Setup) -> Evaluation:
    """Metrics of each adapter, and of an ensemble of them."""
    if not setup.rows.evaluation:
        return Evaluation()
    members = _answers(setup, "evaluating", setup.recipe.adapter_names)
    truncated = members[0].truncated
    if len(members) == 1:
        return Evaluation(quality=_judged(setup, members[0]), truncated=truncated)
    vote = _judged(setup, by_vote(setup.task, members))
    quality = vote if members[0].scores is None else _judged(setup, by_mean(setup.task, members))
    own = [_judged(setup, member).metrics for member in members]
    return Evaluation(quality=quality, members=own, vote=vote.metrics, truncated=truncated)


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


def _judged(setup: Setup, answers: Answers) -> Quality:
    assert setup.rows.evaluation is not None
    return judge(setup.task, setup.rows.evaluation, answers)
