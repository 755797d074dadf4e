"""How cases are run: adapters over one base model at once; a baseline, which changes the base model, alone; text
prompts without training."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from softtune.data import ChoiceTask, LabelTask, Task, Template, TextTask
from softtune.errors import TrainingError, UnsupportedModelError
from softtune.evaluation.answers import answer, fitted, judge
from softtune.experiments.baselines import BASELINES, Baseline
from softtune.experiments.cases import PROMPTS, Case
from softtune.experiments.memory import peak
from softtune.experiments.outcomes import Entry, Outcome
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import Result, train_all
from softtune.training.setup import Progress, Rows, Setup
from softtune.training.together import TASKS
from softtune.training.trainer import InterruptSaver


def run_at_once(cases: Sequence[Case], progress: Progress) -> list[list[Entry]]:
    """Run cases, several only where all are adapters over one base model.

    Args:
        cases: what to run.
        progress: told of every step of all of them.

    Returns:
        What each case came to.

    Raises:
        SofttuneError: one does not fit its task or base model.
    """
    told = _Sum(progress, cases[0].name + (f" and {len(cases) - 1} more" if len(cases) > 1 else ""))
    if cases[0].is_adapter:
        return _train_adapters(cases, told)
    [case] = cases
    run = _prompt if case.entry in PROMPTS else _train_baselines
    return [_entries(case, [{"": outcome} for outcome in run(case, told)])]


class _Sum:
    """Progress of several runs as that of one.

    Args:
        progress: told of the sum.
        name: of all of them.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._counts: dict[str, dict[str, tuple[int, int]]] = {}

    def __call__(self, phase: str, done: int, total: int, notes: str) -> None:
        run, _, what = phase.rpartition(": ")
        counts = self._counts.setdefault(what, {})
        counts[run] = (done, total)
        all_done, all_there = (sum(side) for side in zip(*counts.values(), strict=True))
        self._progress(f"{self._name}: {what}", all_done, all_there, notes if len(counts) == 1 else "")


def _train_adapters(cases: Sequence[Case], progress: Progress) -> list[list[Entry]]:
    """All seeds of all cases at once, where their task allows it."""
    runs = [run for case in cases for run in case.runs]
    for run in runs:
        if RunFolder(run).is_finished:  # and was stopped before it was evaluated
            shutil.rmtree(run.output)
    companies = [runs] if runs[0].task in TASKS else [[run] for run in runs]
    results, memory = peak(lambda: [result for company in companies for result in _train(company, progress)])
    each = iter(results)
    found = []
    for case in cases:
        own = [next(each) for _ in range(case.seeds)]
        failed = next((result for result in own if isinstance(result, TrainingError)), None)
        reports = [result for result in own if isinstance(result, Report)]
        share = len(companies[0])
        outcomes = [_outcomes(report, memory, report.seconds / share) for report in reports]
        found.append(case.failed(failed) if failed else _entries(case, outcomes))
    return found


def _train(runs: Sequence[Recipe], progress: Progress) -> list[Result]:
    has_begun = any(RunFolder(run).is_unfinished for run in runs)
    results = [r for r in train_all(runs, resume=has_begun, before=False, progress=progress) if r is not None]
    if any(isinstance(result, Report) and not result.finished for result in results):
        raise KeyboardInterrupt("stopped; go on with the same command")
    return results


def _outcomes(report: Report, memory: int, seconds: float) -> dict[str, Outcome]:
    """What a run came to; an ensemble's by how its members answer: together, and each alone."""
    found = report.evaluation
    metrics = {"": report.after}
    if found.members:
        first = next(iter(report.after))
        ranked = sorted(found.members, key=lambda member: member[first])
        mean = {name: statistics.mean(member[name] for member in ranked) for name in report.after}
        together = {} if report.after is found.vote else {"mean probability": report.after}
        metrics = {**together, "majority vote": found.vote, "mean of members": mean, "best member": ranked[-1]}
    return {
        way: Outcome(
            metrics=own,
            trained=report.trained,
            total=report.total,
            stored=report.size,
            seconds=seconds,
            memory=memory,
            steps=report.steps,
            training_rows=report.training_rows,
            evaluation_rows=report.evaluation_rows,
        )
        for way, own in metrics.items()
    }


def _entries(case: Case, found: Sequence[Mapping[str, Outcome]]) -> list[Entry]:
    """A case's line, or a line for each way in which an ensemble answers."""
    return [
        Entry(
            name=", ".join(filter(None, (case.name, way))),
            at={**case.at, **({"answered by": way} if way else {})},
            outcomes=[own[way] for own in found],
        )
        for way in found[0]
    ]


class _Prepared:
    """A base model as a baseline trains it."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def adapted(self, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """See ``Models``."""
        set_seed(recipe.seed)
        base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
        model = PeftModel(base)
        self.baseline.prepare(base)
        return model, tokenizer


def _train_baselines(case: Case, progress: Progress) -> list[Outcome]:
    """One after the other, since each trains a base model of its own."""
    return [_baseline(run, BASELINES[case.entry], progress) for run in case.runs]


def _baseline(recipe: Recipe, baseline: Baseline, progress: Progress) -> Outcome:
    rows = Rows.of(recipe)
    setup = Setup.of(RunFolder(recipe), rows, _Prepared(baseline), progress)
    trainer = setup.trainer(setup.model, "default", 0, InterruptSaver())
    trainer.args.save_strategy = "no"
    clock = time.perf_counter()
    with setup.model.disable_adapter():
        _, memory = peak(trainer.train)
        seconds = time.perf_counter() - clock
        answers = answer(setup.model, setup.tokenizer, setup.task, _evaluated(rows), advance=_counted(progress, rows))
    trained, total = setup.model.get_nb_trainable_parameters()
    return Outcome(
        metrics=judge(setup.task, _evaluated(rows), answers).metrics,
        trained=trained,
        total=total,
        stored=sum(p.nbytes for p in setup.model.parameters() if p.requires_grad),
        seconds=seconds,
        memory=memory,
        steps=trainer.state.global_step,
        training_rows=len(setup.examples),
        evaluation_rows=len(_evaluated(rows)),
    )


def _prompt(case: Case, progress: Progress) -> list[Outcome]:
    """The base model alone, with some training rows in front of each record. Without them, all seeds are the same."""
    shots, recipe = PROMPTS[case.entry], case.recipe
    if recipe.task.has_head:
        raise UnsupportedModelError("a head that is not trained answers nothing: leave this entry out")
    base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
    model, rows = PeftModel(base), Rows.of(recipe)
    total = sum(p.numel() for p in base.parameters())
    found = []
    for run in case.runs if shots else case.runs[:1]:
        task = _with_shots(recipe, rows.training.shuffle(seed=run.seed).select(range(shots)), tokenizer)
        with model.disable_adapter():
            answers = answer(model, tokenizer, fitted(task, model), _evaluated(rows), advance=_counted(progress, rows))
        found.append(
            Outcome(
                metrics=judge(task, _evaluated(rows), answers).metrics,
                trained=0,
                total=total,
                stored=0,
                seconds=0,
                memory=0,
                steps=0,
                training_rows=shots,
                evaluation_rows=len(_evaluated(rows)),
            )
        )
    return found


def _with_shots(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The recipe's task, with labelled rows in front of the template."""
    task = recipe.definition
    assert isinstance(task, (LabelTask, TextTask, ChoiceTask))
    if not len(rows):
        return task
    shots = "".join(f"{task.template.filled(row)}{_answer(task, row)}\n\n" for row in rows)
    more = len(tokenizer(shots)["input_ids"])
    template = Template(shots.replace("{", "{{").replace("}", "}}") + task.template.text)
    return dataclasses.replace(task, template=template, max_length=task.max_length + more)


def _answer(task: LabelTask | TextTask | ChoiceTask, row: Mapping[str, Any]) -> str:
    match task:
        case LabelTask():
            return task.verbalizer.word(task.right(row))
        case TextTask():
            return task.right(row)[0]
        case ChoiceTask():
            return task.right(row)


def _evaluated(rows: Rows) -> Dataset:
    assert rows.evaluation is not None
    return rows.evaluation


def _counted(progress: Progress, rows: Rows) -> Callable[[int], None]:
    total = len(_evaluated(rows))
    return lambda done: progress("evaluating", done, total, "")
