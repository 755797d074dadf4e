"""What a finished run resulted in, kept in its folder: a file of metrics, and a part of the model cards.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from softtune import storage
from softtune.card import CARD_NAME, with_results
from softtune.data.sources import is_hub_data_set
from softtune.formatting import in_words
from softtune.peft_types import TaskType
from softtune.tasks.metrics import METRICS
from softtune.training.context_tuning import starts_from_examples
from softtune.training.recipe import Recipe
from softtune.training.report import METRICS_NAME, Report

HUB_TASKS = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_2_SEQ_LM: "text2text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
}
"""The hub's names of tasks without labels of whole records."""
HUB_METRICS = {"macro_f1": "f1", "rouge_l": "rouge"}
"""The hub's names of metrics, where they are others."""


def save_results(recipe: Recipe, report: Report, histories: Sequence[Sequence[Mapping[str, float]]]) -> None:
    """Write the metrics of a finished run into its folder, and into its adapters' model cards.

    Args:
        recipe: its recipe.
        report: its report.
        histories: for each adapter its losses by step, see ``AdapterTrainer.history``.
    """
    with storage.staged(report.folder) as stage:
        storage.write_json(stage / METRICS_NAME, _metrics(recipe, report, histories))
    members = report.evaluation.members or [report.after]
    folders = [report.folder if name == "default" else report.folder / name for name in recipe.adapter_names]
    is_measured = bool(report.after or report.leave_one_out[1])
    for folder, metrics in zip(folders, members, strict=True) if is_measured else ():
        text, results = _text(recipe, report, metrics), _eval_results(recipe, metrics)
        with storage.staged(folder) as stage:
            with_results(folder / CARD_NAME, text, report.folder.resolve().name, results).save(stage / CARD_NAME)


def _metrics(recipe: Recipe, report: Report, histories: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The content of the file of metrics."""
    evaluation = report.evaluation
    validations = [[entry for entry in history if "validation_loss" in entry] for history in histories]
    return {
        "before": report.before,
        "after": report.after,
        "classes": evaluation.quality.classes if evaluation.quality else {},
        "leave_one_out": dict(zip(("before", "after"), report.leave_one_out, strict=True)),
        "members": evaluation.members,
        "vote": evaluation.vote,
        "validation": dict(zip(recipe.adapter_names, validations, strict=True)),
        "best_steps": report.best_steps,
        "best_by": report.best_by,
        "steps": report.steps,
        "seconds": report.seconds,
        "trained_parameters": report.trained,
        "rows": {
            "training": report.training_rows,
            "validation": report.validation_rows,
            "evaluation": report.evaluation_rows,
        },
        "truncated_rows": {"training": report.truncated, "evaluation": evaluation.truncated},
    }


def _text(recipe: Recipe, report: Report, metrics: Mapping[str, float]) -> str:
    """An adapter's results in Markdown."""
    trained = f"after {report.steps} steps on {report.training_rows} rows"
    lines = ["## Results"]
    if metrics:
        lines += ["", f"On {report.evaluation_rows} rows of {_data_set(recipe)}, {trained}:", ""]
        lines += _table(recipe, report.before, metrics)
    before, after = report.leave_one_out
    if after:
        lines += ["", f"Leave-one-out: on the training rows, each without its own virtual tokens, {trained}:", ""]
        lines += _table(recipe, before, after)
    return "\n".join(lines)


def _table(recipe: Recipe, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Metrics before and after training, as the lines of a table."""
    start = "examples in context" if starts_from_examples(recipe) else "base model"
    rows = [
        f"| {in_words(name)} | {_figure(name, before.get(name))} | {_figure(name, x)} |" for name, x in after.items()
    ]
    return [f"| metric | {start} | with the adapter |", "|---|---|---|", *rows]


def _figure(metric: str, value: float | None) -> str:
    return "" if value is None else format(value, METRICS[metric].format)


def _eval_results(recipe: Recipe, metrics: Mapping[str, float]) -> list[EvalResult]:
    """An adapter's results as the hub's metadata."""
    task = recipe.definition
    of_hub = recipe.evaluation is not None and is_hub_data_set(recipe.evaluation)
    return [
        EvalResult(
            task_type="text-classification" if task.label_set else HUB_TASKS[task.kind],
            dataset_type=_data_set(recipe),
            dataset_name=_data_set(recipe),
            dataset_split=recipe.evaluation_split if of_hub else None,
            metric_type=HUB_METRICS.get(name, name),
            metric_name=in_words(name),
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
    ]


def _data_set(recipe: Recipe) -> str:
    """The evaluation data: the hub's name of a data set, or a file's name without its folder."""
    source = recipe.evaluation or recipe.sources[0]
    return source if is_hub_data_set(source) else Path(source).name
