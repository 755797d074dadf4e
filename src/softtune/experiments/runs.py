"""Runs cases: adapters on one base model at once, all others alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from softtune.errors import TrainingError
from softtune.experiments.cases import PROMPTS, Case
from softtune.experiments.isolated_run import clear, run_isolated, stored
from softtune.experiments.outcomes import Entry, Outcome
from softtune.experiments.prompting import answer_alone
from softtune.formatting import shortened
from softtune.tasks.metrics import direction
from softtune.training.compatibility import trains_beside_others
from softtune.training.folder import RunFolder
from softtune.training.progress import Phase, Progress
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import Result, train_all

LONGEST = 24
"""Characters of a case's name beside a progress bar."""


def run_at_once(cases: Sequence[Case], progress: Progress) -> list[list[Entry]]:
    """Run cases; several only if all are adapters on one base model.

    Args:
        cases: the cases to run.
        progress: called at every step of each case.

    Returns:
        The results of each case.

    Raises:
        SofttuneError: a case does not fit its task or base model.
    """
    first = shortened(cases[0].name, LONGEST)
    sums = _Sum(progress, first + (f" and {len(cases) - 1} more" if len(cases) > 1 else ""))
    if cases[0].is_adapter and not cases[0].is_alone:
        return _train_at_once(cases, sums)
    [case] = cases
    found = answer_alone(case, sums) if case.entry in PROMPTS else [run_isolated(case, run, sums) for run in case.runs]
    return [_entries(case, [{"": outcome} for outcome in found])]


class _Sum:
    """Adds up the progress of several runs, for training and evaluation each.

    Args:
        progress: called with the sums.
        name: name of all runs together.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._counts: dict[Phase, dict[Phase, tuple[int, int]]] = {}

    def __call__(self, phase: Phase, done: int, total: int, notes: str) -> None:
        of_all = Phase(phase.activity)
        counts = self._counts.setdefault(of_all, {})
        counts[phase] = (done, total)
        all_done, all_there = (sum(side) for side in zip(*counts.values(), strict=True))
        own = notes if len(counts) == 1 else ""
        self._progress(of_all, all_done, all_there, ", ".join(filter(None, (self._name, own))))


def _train_at_once(cases: Sequence[Case], progress: Progress) -> list[list[Entry]]:
    """Train all seeds of all cases at once, where their tasks and methods support it."""
    runs = [run for case in cases for run in case.runs]
    for run in runs:
        if RunFolder(run).is_finished:
            clear(run)
    groups = [runs] if all(map(trains_beside_others, runs)) else [[run] for run in runs]
    each = iter([result for group in groups for result in _train(group, progress)])
    found = []
    for case in cases:
        results = [next(each) for _ in range(case.seeds)]
        failed = next((result for result in results if isinstance(result, TrainingError)), None)
        reports = [result for result in results if isinstance(result, Report)]
        found.append(case.failed(failed) if failed else _entries(case, [_outcomes(report) for report in reports]))
    return found


def _train(runs: Sequence[Recipe], progress: Progress) -> list[Result]:
    has_begun = any(RunFolder(run).is_unfinished for run in runs)
    results = [r for r in train_all(runs, resume=has_begun, before=False, progress=progress) if r is not None]
    if any(isinstance(result, Report) and not result.finished for result in results):
        raise KeyboardInterrupt
    return results


def _outcomes(report: Report) -> dict[str, Outcome]:
    """Results of a run by name. An ensemble has several: for each vote, the mean of its members, and the best one."""
    evaluation = report.evaluation
    metrics = {"": report.after}
    if evaluation.members:
        first = next(iter(report.after))
        ranked = sorted(evaluation.members, key=lambda member: direction(first) * member[first])
        mean = {name: statistics.mean(member[name] for member in ranked) for name in report.after}
        together = {} if report.after is evaluation.vote else {"mean probability": report.after}
        metrics = {**together, "majority vote": evaluation.vote, "mean of members": mean, "best member": ranked[-1]}
    return {
        way: Outcome(
            metrics=scores,
            trained=report.trained,
            total=report.total,
            stored=stored(report.folder),
            seconds=0,
            memory=0,
            steps=report.steps,
            training_rows=report.training_rows,
            evaluation_rows=report.evaluation_rows,
        )
        for way, scores in metrics.items()
    }


def _entries(case: Case, outcomes: Sequence[Mapping[str, Outcome]]) -> list[Entry]:
    """The entry of a case, or an entry for each way in which an ensemble answers."""
    return [
        Entry(
            name=", ".join(filter(None, (case.name, way))),
            at={**case.at, **({"answered by": way} if way else {})},
            outcomes=[by_way[way] for by_way in outcomes],
        )
        for way in outcomes[0]
    ]
