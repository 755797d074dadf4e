"""Runs recipes: training, and evaluation before and after it.

Recipes that share a base model run at once, and so do the members of an ensemble.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import set_seed

from softtune.errors import AdapterError, TrainingError
from softtune.evaluation.answers import Answers, judge
from softtune.evaluation.ensemble import by_mean, by_vote
from softtune.extras import require
from softtune.injection.provenance import BASE
from softtune.tasks.metrics import LOSS, Quality
from softtune.training import ranks
from softtune.training.callbacks import InterruptSaver
from softtune.training.compatibility import check_compatible, check_processes
from softtune.training.folder import RunFolder, check_folders, what_is_kept
from softtune.training.hub import create_repositories, pushed
from softtune.training.multi_run import train_together
from softtune.training.progress import EVALUATING, EVALUATING_BASE_MODEL, IN_CONTEXT, Phase, Progress
from softtune.training.recipe import Recipe
from softtune.training.report import Evaluation, Report
from softtune.training.results import save_results
from softtune.training.setup import BaseModels, Rows, Setup
from softtune.training.trainer import AdapterTrainer

Result = Report | TrainingError
"""A recipe's report, or the error that ended its training while the other recipes went on."""


def train(recipe: Recipe, *, resume: bool | str = False, progress: Progress = lambda *_: None) -> Report:
    """Train and evaluate an adapter, or an ensemble, by a recipe.

    Args:
        recipe: the recipe.
        resume: resume from the last checkpoint of an interrupted run of the same recipe, or from the one of this name,
            such as checkpoint-100; later ones are then removed.
        progress: called after every step.

    Raises:
        ConfigError: the recipe is invalid, its output has an adapter or an unfinished run, there is none to resume, or
            the hub does not take what is to be pushed.
        CheckpointError: the output is a file or cannot be written.
        DataError: the data does not fit.
        MissingExtraError: there are rows to evaluate, or a metric chooses the best checkpoint, and the extra
            ``metrics`` is not installed; or the package of a quantisation or an optimiser is not.
        TrainingError: the loss or the adapter is NaN or infinite; the adapter is saved with its last good weights. Or
            the finished folder could not be pushed.
        KeyboardInterrupt: Ctrl-C outside of training, or a second one; its message says what is kept.
    """
    [result] = train_all([recipe], resume=resume, progress=progress)
    if isinstance(result, TrainingError):
        raise result
    assert result is not None
    return result


def train_all(
    recipes: Sequence[Recipe],
    *,
    resume: bool | str = False,
    before: bool = True,
    progress: Progress = lambda *_: None,
) -> list[Result | None]:
    """Run recipes that share a base model at once, with the same results as one after the other.

    Args:
        recipes: the recipes.
        resume: resume from the last checkpoints of an interrupted run of the same recipes, or from those of this name,
            see ``train``. Recipes without a checkpoint start anew, and finished ones are left as they are.
        before: evaluate the base model alone, too.
        progress: called after every step of each run.

    Returns:
        For each recipe its report, or the error that ended its training while the others went on; None where it was
        finished before.

    Raises:
        ConfigError: as from ``train``, or two recipes differ in a setting that they must share, or have one output.
        CheckpointError, DataError, MissingExtraError, KeyboardInterrupt: as from ``train``.
        SofttuneError: another process of the run has ended.
    """
    check_compatible(recipes)
    ranks.start(recipes[0].load_options.torch_device)
    check_processes(recipes)
    folders = [RunFolder(recipe, resume if isinstance(resume, str) else None) for recipe in recipes]
    ranks.on_main_process(lambda: check_folders(folders, resume=bool(resume)))
    left = [folder for folder in folders if not folder.is_finished]
    repositories = ranks.on_main_process(lambda: create_repositories([folder.recipe for folder in left]))
    try:
        with ranks.needing_all():
            results = dict(zip(left, _train(left, before, progress), strict=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_kept(folders)) from None
    for folder, result in results.items():
        if folder.recipe.push_to_hub and isinstance(result, Report) and result.finished:
            results[folder] = pushed(result, repositories[folder.recipe.output])
    return [results.get(folder) for folder in folders]


def _train(folders: Sequence[RunFolder], before: bool, progress: Progress) -> list[Result]:
    """Load all data first, where errors show soonest; then train and evaluate."""
    rows = [Rows.load(folder.recipe) for folder in folders]
    ranks.check_same([each.fingerprints for each in rows])
    if any(_needs_metrics(folder.recipe, there) for folder, there in zip(folders, rows, strict=True)):
        require("metrics")
    for folder, recipe_rows in zip(folders, rows, strict=True):
        if folder.is_unfinished:
            folder.check_data(recipe_rows.fingerprints)
    bases, several = BaseModels(), len(folders) > 1
    setups = [
        Setup.prepare(folder, recipe_rows, bases, _with_output_name(progress, folder.recipe) if several else progress)
        for folder, recipe_rows in zip(folders, rows, strict=True)
    ]
    befores: list[dict[str, float]] = []
    for setup in setups:
        alike = (b for s, b in zip(setups, befores, strict=False) if s.asks_as(setup))
        befores.append(_begin(setup, next(alike, None) if before else {}))
    leave_one_out = [setup.evaluate_leave_one_out() for setup in setups]
    for folder in folders:
        ranks.on_main_process(folder.drop_later)
    fits = _fit(setups)
    for setup, fit in zip(setups, fits, strict=True):
        if fit.finished:
            setup.folder.save(setup.model, fit.histories)
    return [_result(*each) for each in zip(setups, befores, leave_one_out, fits, strict=True)]


def _needs_metrics(recipe: Recipe, rows: Rows) -> bool:
    """Whether a run measures answers by packages of the extra ``metrics``."""
    measures = bool(rows.evaluation) or (recipe.is_validated and recipe.metric_for_best_model != LOSS)
    return measures and recipe.definition.needs_metrics


def _with_output_name(progress: Progress, recipe: Recipe) -> Progress:
    """Add the output's name to the phase, to tell several recipes apart."""
    return lambda phase, *step: progress(replace(phase, run=Path(recipe.output).name), *step)


def _begin(setup: Setup, known: dict[str, float] | None) -> dict[str, float]:
    """Evaluate the base model alone, or with the examples that the prompt starts from, unless its metrics are known or
    a run is resumed, and save them in the folder.

    Args:
        setup: the recipe's.
        known: metrics of the same evaluation, {} to skip it; None to run it.
    """
    if setup.folder.is_unfinished:
        return setup.folder.before
    metrics = known or {}
    if setup.rows.evaluation and known is None:
        phase, name = (IN_CONTEXT, setup.recipe.adapter_names[0]) if setup.starts else (EVALUATING_BASE_MODEL, BASE)
        [answers] = _answers(setup, phase, [name])
        metrics = _judged(setup, answers).metrics
    ranks.on_main_process(lambda: setup.folder.begin(metrics, setup.rows.fingerprints))
    return metrics


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How a recipe's training ended."""

    steps: int
    finished: bool
    """Whether training is complete: every adapter has either ended or failed."""
    error: TrainingError | None
    """The first error of one of its adapters."""
    seconds: float
    best_steps: list[int]
    """See ``Report``."""
    histories: list[list[dict[str, float]]]
    """Losses by step, for each adapter."""


def _fit(setups: Sequence[Setup]) -> list[_Fit]:
    """Train all adapters of all recipes."""
    interrupt = InterruptSaver()
    by_recipe = [setup.trainers(interrupt) for setup in setups]
    trainers = [trainer for each in by_recipe for trainer in each]
    starts = [start for setup in setups for start in setup.folder.starts.values()]
    clock = time.perf_counter()
    with interrupt:
        errors = _errors(trainers, starts, interrupt)
    seconds = time.perf_counter() - clock
    failed = {trainer: error for trainer, error in zip(trainers, errors, strict=True) if error is not None}
    interrupted = interrupt.interrupted and not all(t in failed or t.has_ended for t in trainers)
    return [_fit_of(each, failed, interrupted, seconds) for each in by_recipe]


def _fit_of(
    trainers: Sequence[AdapterTrainer],
    failed: Mapping[AdapterTrainer, TrainingError],
    interrupted: bool,
    seconds: float,
) -> _Fit:
    """Summarize the training of one recipe's adapters, some of which may have failed."""
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


def _errors(
    trainers: Sequence[AdapterTrainer], starts: Sequence[str | None], interrupt: InterruptSaver
) -> list[TrainingError | None]:
    """Train adapters at once, or where several processes share their batches one after the other."""
    if len(trainers) > 1 and ranks.world_size() == 1:
        return train_together(trainers, starts)
    errors = []
    for trainer, start in zip(trainers, starts, strict=True):
        if len(trainers) > 1:
            set_seed(trainer.args.seed)  # its own, as when it was made
        errors.append(_error(trainer, start, interrupt))
    return errors


def _error(trainer: AdapterTrainer, start: str | None, interrupt: InterruptSaver) -> TrainingError | None:
    """Train an adapter, unless an interrupt has ended all training; return the error that ends its own."""
    try:
        if not interrupt.agreed():
            trainer.train(resume_from_checkpoint=start)
    except TrainingError as error:
        return error
    return None


def _result(setup: Setup, before: dict[str, float], leave_one_out: dict[str, float], fit: _Fit) -> Result:
    """Evaluate and report what was trained. An interrupted run is not evaluated; a failed one gives its error."""
    if fit.finished and fit.error is not None:
        return fit.error
    try:
        evaluation = _evaluated(setup) if fit.finished else Evaluation()
        leave_one_out_after = setup.evaluate_leave_one_out() if fit.finished else {}
    except AdapterError as error:
        return TrainingError(error.what, error.remedy)
    trained, total = setup.model.get_nb_trainable_parameters()
    report = Report(
        finished=fit.finished,
        steps=fit.steps,
        before=before,
        evaluation=evaluation,
        trained=trained,
        total=total,
        training_rows=len(setup.rows.training),
        validation_rows=len(setup.rows.validation),
        best_steps=fit.best_steps,
        best_by=setup.recipe.metric_for_best_model,
        evaluation_rows=len(setup.rows.evaluation or ()),
        truncated=setup.truncated,
        folder=setup.folder.path,
        seconds=fit.seconds,
        leave_one_out=(leave_one_out, leave_one_out_after),
    )
    if fit.finished:
        ranks.on_main_process(lambda: save_results(setup.recipe, report, fit.histories))
    return report


def _evaluated(setup: Setup) -> Evaluation:
    """Evaluate each adapter, and an ensemble of them."""
    if not setup.rows.evaluation:
        return Evaluation()
    members = _answers(setup, EVALUATING, setup.recipe.adapter_names)
    truncated = members[0].truncated
    if len(members) == 1:
        return Evaluation(quality=_judged(setup, members[0]), truncated=truncated)
    vote = _judged(setup, by_vote(setup.task, members))
    quality = vote if members[0].scores is None else _judged(setup, by_mean(setup.task, members))
    member_metrics = [_judged(setup, member).metrics for member in members]
    return Evaluation(quality=quality, members=member_metrics, vote=vote.metrics, truncated=truncated)


def _answers(setup: Setup, phase: Phase, names: Sequence[str]) -> list[Answers]:
    """Predict the evaluation rows with each of these adapters."""
    rows = setup.rows.evaluation
    assert rows is not None
    return setup.answers(setup.model, rows, names, phase)


def _judged(setup: Setup, answers: Answers) -> Quality:
    assert setup.rows.evaluation is not None
    return judge(setup.task, setup.rows.evaluation, answers)
