"""What an experiment runs: a recipe's task by a method, by a baseline or by a text prompt, each with several seeds.

Adapters over one base model train at once; a baseline changes the base model, and trains alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from softtune.data import LabelTask, Template, TextTask
from softtune.errors import ConfigError, SofttuneError, TrainingError
from softtune.evaluation.answers import answer, fitted, judge
from softtune.experiments import outcomes
from softtune.experiments.baselines import BASELINES, Baseline
from softtune.experiments.memory import peak
from softtune.experiments.outcomes import Entry, Outcome
from softtune.methods import PeftType
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.company import shared
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import Result, train_all
from softtune.training.setup import Progress, Rows, Setup
from softtune.training.together import TASKS
from softtune.training.trainer import InterruptSaver

METHODS: dict[str, dict[str, Any]] = {
    "prefix-tuning": {"method": PeftType.PREFIX_TUNING},
    "prompt-tuning": {"method": PeftType.PROMPT_TUNING},
    "p-tuning": {"method": PeftType.P_TUNING},
    "p-tuning-v2": {"method": PeftType.P_TUNING_V2},
    "bitfit": {"method": PeftType.BITFIT, "options": {"add_missing": True}},
}
"""Fields of the recipe that each method replaces; the recipe's own method keeps the recipe's."""

PROMPTS = {"zero-shot": 0, "few-shot": 4}
"""Rows in front of each record, for a base model that nothing is trained of."""

Runner = Callable[[Sequence[Sequence["Case"]], Progress], Iterator[tuple["Case", list[Entry]]]]
"""Runs bundles of cases somewhere, and gives each case with what it came to."""

ENTRIES = (*METHODS, *BASELINES, *PROMPTS)
"""The ways to do a task."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe, with several seeds."""

    name: str
    number: int
    """Its place among the others of the experiment."""
    entry: str = ""
    """Of ``ENTRIES``; the recipe's own method where it is empty."""
    recipe: Recipe
    """Its output is the folder of the experiment."""
    seeds: int
    at: dict[str, Any] = field(default_factory=dict)
    """See ``Entry``."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], entry: str, changes: Mapping[str, Any], **own: Any) -> Case:
        """A case of a recipe's fields, some of them changed.

        Args:
            fields: the recipe's that are set.
            entry: of ``ENTRIES``, or empty.
            changes: values by field; ``options.name`` is one option.
            own: the case's other fields.

        Raises:
            ConfigError: an unknown entry, or fields that do not go together.
        """
        if entry and entry not in ENTRIES:
            raise ConfigError(f"no entry {entry!r}: use some of {', '.join(ENTRIES)}")
        method, no_trunk = METHODS.get(entry, {}), {"trunk_cache": 0, "trunk_cache_disk": 0}
        if method and method["method"] != Recipe.of(fields).method:
            fields = {**fields, "options": {}, "learning_rate": None, **no_trunk, **method}
        if entry in BASELINES:
            rate = BASELINES[entry].learning_rate
            fields = {**fields, "learning_rate": rate, "patience": None, "ensemble": 1, **no_trunk}
        return cls(entry=entry, recipe=Recipe.of(with_changes(fields, changes)), **own)

    @property
    def folder(self) -> Path:
        """Of the experiment."""
        return Path(self.recipe.output)

    @property
    def stem(self) -> str:
        """Its name as a file's."""
        return outcomes.stem_of(self.name)

    @property
    def is_adapter(self) -> bool:
        """Whether the base model stays frozen, so that others can train beside it."""
        return self.entry not in BASELINES and self.entry not in PROMPTS

    @property
    def asked(self) -> dict[str, Any]:
        """What tells it from another of the same name."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output"})
        return {"entry": self.entry, "seeds": self.seeds, "recipe": recipe}

    @property
    def runs(self) -> list[Recipe]:
        """A recipe for each seed, all on the same rows."""
        changes = [
            {
                "seed": self.recipe.seed + number * self.recipe.ensemble,
                "data_seed": self.recipe.rows_seed,
                "output": str(self.folder / f"{self.stem}-{number + 1}"),
            }
            for number in range(self.seeds)
        ]
        return [self.recipe.model_copy(update=change) for change in changes]

    @property
    def kept(self) -> list[Entry] | None:
        """What it came to in an earlier run. Raises ConfigError where that is of another experiment."""
        return outcomes.kept(self.folder, self.stem, self.asked)

    def keep(self, entries: Sequence[Entry]) -> None:
        """Write what it came to."""
        outcomes.keep(self.folder, self.stem, self.number, self.asked, entries)

    def failed(self, error: SofttuneError) -> list[Entry]:
        """What it came to where it cannot be run."""
        return [Entry(name=self.name, at=self.at, outcomes=[], failure=str(error))]


def with_changes(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields, some of them changed; ``options.name`` is one option."""
    changed = dict(fields)
    for name, value in changes.items():
        whole, _, part = name.partition(".")
        changed[whole] = {**(changed.get(whole) or {}), part: value} if part else value
    return changed


def run_cases(
    cases: Sequence[Case], *, at_once: int, run: Runner | None = None, progress: Progress = lambda *_: None
) -> list[list[Entry]]:
    """Run those cases that are not kept from before, and keep them.

    Args:
        cases: of one experiment.
        at_once: runs that train at once over one base model.
        run: where; in this process by default.
        progress: told of every step.

    Returns:
        What each case came to.

    Raises:
        ConfigError: a recipe without rows to evaluate on, or there is another experiment in the folder.
        DataError: the data does not fit.
    """
    if any(case.recipe.evaluation is None and not case.recipe.test_size for case in cases):
        raise ConfigError("an experiment needs rows to evaluate on: set evaluation or test_size")
    found = {case.stem: case.kept for case in cases}
    left = list({case.stem: case for case in cases if found[case.stem] is None}.values())
    for done, (case, entries) in enumerate((run or run_here)(bundles(left, at_once), progress), start=1):
        case.keep(entries)
        found[case.stem] = entries
        progress("all", len(found) - len(left) + done, len(found), "")
    return [found[case.stem] or [] for case in cases]


def bundles(cases: Sequence[Case], at_once: int) -> list[list[Case]]:
    """Cases that train at once: over one base model, and no more runs than these; at least one case."""
    found: list[list[Case]] = []
    for case in cases:
        if found and _fit_together([*found[-1], case], at_once):
            found[-1].append(case)
        else:
            found.append([case])
    return found


def run_here(bundles: Sequence[Sequence[Case]], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Run bundles one after the other in this process."""
    for bundle in bundles:
        yield from run_bundle(bundle, progress)


def run_bundle(cases: Sequence[Case], progress: Progress) -> Iterator[tuple[Case, list[Entry]]]:
    """Run cases at once. Where one of several does not fit its task or base model, each is run alone to tell which."""
    if cases[0].is_adapter:
        try:
            yield from zip(cases, _train_adapters(cases, progress), strict=True)
        except SofttuneError as error:
            if len(cases) == 1:
                yield cases[0], cases[0].failed(error)
            else:
                for case in cases:
                    yield from run_bundle([case], progress)
        return
    [case] = cases
    run = _prompted if case.entry in PROMPTS else _trained_baselines
    try:
        yield case, _entries(case, [{"": own} for own in run(case, _Sum(progress, case.name))])
    except SofttuneError as error:
        yield case, case.failed(error)


def _fit_together(cases: Sequence[Case], at_once: int) -> bool:
    runs = sum(case.seeds * case.recipe.ensemble for case in cases)
    alike = all(case.is_adapter and shared(case.recipe) == shared(cases[0].recipe) for case in cases)
    return alike and runs <= at_once


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
    told = _Sum(progress, cases[0].name + (f" and {len(cases) - 1} more" if len(cases) > 1 else ""))
    companies = [runs] if runs[0].task in TASKS else [[run] for run in runs]
    results, memory = peak(lambda: [result for company in companies for result in _train(company, told)])
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


def _trained_baselines(case: Case, progress: Progress) -> list[Outcome]:
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


def _prompted(case: Case, progress: Progress) -> list[Outcome]:
    """The base model alone, with some training rows in front of each record. Without them, all seeds are the same."""
    shots, recipe = PROMPTS[case.entry], case.recipe
    if recipe.task.has_head:
        raise ConfigError("a head that is not trained answers nothing: leave this entry out")
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


def _with_shots(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The recipe's task, with labelled rows in front of the template."""
    task = recipe.definition
    if not len(rows):
        return task
    if not isinstance(task, (LabelTask, TextTask)):
        raise ConfigError("rows in front of a record are for labels and texts that are written: leave this entry out")
    shots = "".join(f"{task.template.filled(row)}{_answer(task, row)}\n\n" for row in rows)
    more = len(tokenizer(shots)["input_ids"])
    template = Template(shots.replace("{", "{{").replace("}", "}}") + task.template.text)
    return dataclasses.replace(task, template=template, max_length=task.max_length + more)


def _answer(task: LabelTask | TextTask, row: Mapping[str, Any]) -> str:
    return task.verbalizer.word(task.right(row)) if isinstance(task, LabelTask) else task.right(row)[0]


def _evaluated(rows: Rows) -> Dataset:
    assert rows.evaluation is not None
    return rows.evaluation


def _counted(progress: Progress, rows: Rows) -> Callable[[int], None]:
    total = len(_evaluated(rows))
    return lambda done: progress("evaluating", done, total, "")
