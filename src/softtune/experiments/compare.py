"""The same task by several methods and baselines, under one budget: as many steps on the same rows, with several seeds.

An entry's outcomes are kept as soon as they are there, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from softtune import storage
from softtune.data import LabelTask, Template, TextTask
from softtune.errors import ConfigError, SofttuneError, TrainingError
from softtune.evaluation.answers import answer, judge
from softtune.experiments.baselines import BASELINES, Baseline
from softtune.experiments.memory import peak
from softtune.methods import PeftType
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.report import Report
from softtune.training.run import train_all
from softtune.training.setup import Progress, Rows, Setup
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

ENTRIES_NAME = "entries"
"""The folder in a comparison's where its entries are."""

ENTRIES = (*METHODS, *BASELINES, *PROMPTS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to."""

    metrics: dict[str, float]
    trained: int
    """Numbers that were trained."""
    total: int
    """All numbers of the model."""
    stored: int
    """Bytes that a task needs on disk beside the base model."""
    seconds: float
    """Of training."""
    memory: int
    """Most bytes in use while training, the base model's among them."""
    steps: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a comparison."""

    name: str
    outcomes: list[Outcome]
    """One a seed; empty where it failed."""
    failure: str = ""
    """Why it failed, or does not go with this task or base model."""

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return statistics.mean(outcome.metrics[metric] for outcome in self.outcomes)

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds; 0 of one."""
        values = [outcome.metrics[metric] for outcome in self.outcomes]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def compare(
    recipe: Recipe, names: Sequence[str] = ENTRIES, *, seeds: int = 3, progress: Progress = lambda *_: None
) -> list[Entry]:
    """Run a recipe's task by several methods and baselines.

    Args:
        recipe: the task, the data and the steps. Its output is the folder of the comparison.
        names: of ``ENTRIES``.
        seeds: runs of each, with the recipe's seed and those that follow it.
        progress: told of every step.

    Raises:
        ConfigError: an unknown name, or a recipe without evaluation rows.
        DataError: the data does not fit.
    """
    if odd := [name for name in names if name not in ENTRIES]:
        raise ConfigError(f"no entry {odd[0]!r}: use some of {', '.join(ENTRIES)}")
    if recipe.evaluation is None and not recipe.test_size:
        raise ConfigError("a comparison needs rows to evaluate on: set evaluation or test_size")
    found = []
    for name in names:
        file = Path(recipe.output, ENTRIES_NAME, f"{name}.json")
        entry = _kept(file, recipe, seeds)
        if entry is None:
            entry = _run(name, recipe, seeds, progress)
            _keep(file, recipe, seeds, entry)
        found.append(entry)
    return found


def entries_of(folder: Path) -> list[Entry]:
    """Those that a comparison has kept in a folder, in the order of ``ENTRIES``."""
    files = (folder / ENTRIES_NAME / f"{name}.json" for name in ENTRIES)
    return [_read(file) for file in files if file.is_file()]


def _run(name: str, recipe: Recipe, seeds: int, progress: Progress) -> Entry:
    def told(phase: str, *step: Any) -> None:
        progress(f"{name}: {phase}", *step)

    run: Callable[[Recipe, int, Progress], list[Outcome]]
    run = _prompted if name in PROMPTS else _trained_baselines if name in BASELINES else _trained_adapters
    try:
        return Entry(name=name, outcomes=run(_named(recipe, name), seeds, told))
    except SofttuneError as error:
        return Entry(name=name, outcomes=[], failure=str(error))


def _named(recipe: Recipe, name: str) -> Recipe:
    """A recipe for an entry, in a folder of its own."""
    changes = METHODS.get(name, {})
    if changes.get("method") is recipe.method:
        changes = {}
    elif changes:
        changes = {"options": {}, "learning_rate": None, "trunk_cache": 0, "trunk_cache_disk": 0, **changes}
    fields = recipe.model_dump(exclude_unset=True) | changes | {"ensemble": 1, "output": str(Path(recipe.output, name))}
    return Recipe.of(fields)


def _seeds(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The same rows for all of them."""
    return [recipe.member(number, Path(recipe.output) / str(number + 1)) for number in range(seeds)]


def _trained_adapters(recipe: Recipe, seeds: int, progress: Progress) -> list[Outcome]:
    """All seeds at once; a seed's share of the time is as large as every other's."""
    own = _seeds(recipe, seeds)
    results, memory = peak(lambda: train_all(own, resume=_has_begun(own), progress=progress))
    outcomes = []
    for result in results:
        if isinstance(result, TrainingError):
            raise result
        if isinstance(result, Report) and not result.finished:
            raise KeyboardInterrupt("stopped; go on with the same command")
        assert result is not None
        outcomes.append(
            Outcome(
                metrics=result.after,
                trained=result.trained,
                total=result.total,
                stored=result.size,
                seconds=result.seconds / seeds,
                memory=memory,
                steps=result.steps,
            )
        )
    return outcomes


def _has_begun(recipes: Sequence[Recipe]) -> bool:
    return any(RunFolder(recipe).is_unfinished for recipe in recipes)


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


def _trained_baselines(recipe: Recipe, seeds: int, progress: Progress) -> list[Outcome]:
    """One after the other, since each trains a base model of its own."""
    baseline = BASELINES[Path(recipe.output).name]
    fields = {"learning_rate": baseline.learning_rate, "patience": None, "trunk_cache": 0, "trunk_cache_disk": 0}
    return [_baseline(own.model_copy(update=fields), baseline, progress) for own in _seeds(recipe, seeds)]


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
    )


def _prompted(recipe: Recipe, seeds: int, progress: Progress) -> list[Outcome]:
    """The base model alone, with some training rows in front of each record. Without them, all seeds are the same."""
    shots = PROMPTS[Path(recipe.output).name]
    base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels)
    model, rows = PeftModel(base), Rows.of(recipe)
    if recipe.task.has_head:
        raise ConfigError("a head that is not trained answers nothing: leave this entry out")
    outcomes = []
    for seed in range(seeds if shots else 1):
        task = _with_shots(recipe, rows.training.shuffle(seed=recipe.seed + seed).select(range(shots)), tokenizer)
        with model.disable_adapter():
            answers = answer(model, tokenizer, task, _evaluated(rows), advance=_counted(progress, rows))
        metrics = judge(task, _evaluated(rows), answers).metrics
        total = sum(p.numel() for p in base.parameters())
        outcomes.append(Outcome(metrics=metrics, trained=0, total=total, stored=0, seconds=0, memory=0, steps=0))
    return outcomes


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


def _keep(file: Path, recipe: Recipe, seeds: int, entry: Entry) -> None:
    with storage.staged(file.parent) as stage:
        storage.write_json(stage / file.name, {"asked": _asked(recipe, seeds), **dataclasses.asdict(entry)})


def _kept(file: Path, recipe: Recipe, seeds: int) -> Entry | None:
    """An entry of an earlier comparison of the same.

    Raises:
        ConfigError: it is of another one.
    """
    if not file.is_file():
        return None
    if storage.read_json(file)["asked"] != _asked(recipe, seeds):
        raise ConfigError(f"{file.parent} is of another comparison: name another output, or delete it")
    return _read(file)


def _read(file: Path) -> Entry:
    found = storage.read_json(file)
    outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
    return Entry(name=found["name"], outcomes=outcomes, failure=found["failure"])


def _asked(recipe: Recipe, seeds: int) -> dict[str, Any]:
    return {"seeds": seeds, **recipe.model_dump(mode="json", exclude={"output"})}
