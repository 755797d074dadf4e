"""``softtune check``: check softtune's promises on a given base model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from softtune import checkpoint, self_check
from softtune.backbone.interface import stock_name
from softtune.cli import FAILED
from softtune.cli.console import console, quiet
from softtune.cli.flags import with_load_flags
from softtune.compat import INSTALLED, is_tested
from softtune.errors import ConfigError, UnsupportedModelError
from softtune.experiments.cases import DEFAULT_METHODS, METHODS
from softtune.methods import PeftConfig
from softtune.model import PeftModel
from softtune.peft_types import PeftType, TaskType, known_task
from softtune.pretrained import LoadOptions, load_base_model
from softtune.promises import PROMISES, Broken, NotAsked, Outcome, Refused

WIDTH, WIDE = 28, 110
"""Minimum width of the column of promises, and the terminal width from which on it applies."""
METHOD = 10
"""Width of a method's column; the methods that do not fit beside one another get tables of their own."""


@with_load_flags
def command(
    model: Annotated[str, typer.Argument(help="Base model: a folder or hub name, smollm2-135m or minilm.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"Check this method alone; may be repeated. One of {', '.join(METHODS)}.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Check the method and the task of this adapter.")] = None,
    task: Annotated[str | None, typer.Option(help="What the base model is loaded for. [default: CAUSAL_LM]")] = None,
    *,
    load: Mapping[str, Any],
) -> None:
    """Check what softtune promises on a base model: padding and caches change nothing, all is trained."""
    quiet()
    if adapter is not None and (method or task):
        raise ConfigError("an adapter has a method and a task of its own", "drop --method and --task, or --adapter")
    saved = None if adapter is None else PeftConfig.from_pretrained(adapter)
    kind = known_task(task or (saved and saved.task_type) or TaskType.CAUSAL_LM)
    configs = [saved] if saved else [_config(name, kind) for name in method or DEFAULT_METHODS]
    base, _ = load_base_model(model, kind, options=LoadOptions(**load))
    if adapter is not None:
        checkpoint.check_base_model(adapter, PeftModel(base).backbone)
    columns = {_name_of(config): _outcomes(base, config) for config in configs}
    _show(base, columns)
    failed = [name for name, outcomes in columns.items() if any(isinstance(o, Broken) for o in outcomes.values())]
    if failed:
        print(f"softtune: promises fail for {', '.join(failed)}: see the table", file=sys.stderr)
        sys.exit(FAILED)


def _name_of(config: PeftConfig) -> str:
    return next(name for name, fields in METHODS.items() if fields["method"] is config.peft_type)


def _config(name: str, task: TaskType) -> PeftConfig:
    try:
        method = PeftType(name)
    except ValueError as error:
        raise ConfigError(f"--method {name!r} is no method", f"use one of {', '.join(METHODS)}") from error
    options = next(fields.get("options", {}) for fields in METHODS.values() if fields["method"] is method)
    return PeftConfig.from_dict({"peft_type": method, "task_type": task, **options})


def _outcomes(base: PreTrainedModel, config: PeftConfig) -> dict[str, Outcome]:
    """The outcome of each promise; all are refused if the base model does not support the method."""
    model = PeftModel(base)
    try:
        return self_check.check(model.backbone, config, PeftModel.with_adapter, thorough=True)
    except UnsupportedModelError as error:
        return dict.fromkeys(PROMISES, Refused(str(error)))


def _show(base: PreTrainedModel, columns: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Print a table of promises by method, and below it the reasons for those that do not hold."""
    words = {"dtype": str(base.dtype).removeprefix("torch."), "attention": stock_name(base.config) or "its own"}
    state = "tested" if is_tested(base) else "not among those tested"
    title = f"{type(base).__name__}, transformers {INSTALLED}, {', '.join(words.values())}: {state}"
    names = list(columns)
    for first in range(0, len(names), count := max(1, console.width // METHOD - 2)):
        some = {name: columns[name] for name in names[first : first + count]}
        table = Table("promise", *(name.replace("-", " ") for name in some), title=title, title_justify="left")
        table.columns[0].min_width = WIDTH if console.width >= WIDE else None
        for name, promise in PROMISES.items():
            table.add_row(promise.text, *(_cell(outcomes[name]) for outcomes in some.values()))
        console.print(table)
        title = ""
    for note in dict.fromkeys(_notes(columns)):
        console.print(note, soft_wrap=True, markup=False)


def _cell(outcome: Outcome) -> str | Text:
    if outcome is None:
        return "holds"
    if isinstance(outcome, Broken):
        return Text("FAILS", style="bold red")
    return "not asked" if isinstance(outcome, NotAsked) else "refused"


def _notes(columns: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    """The reasons for the promises that do not hold, in the order of the table's rows."""
    for name, promise in PROMISES.items():
        for method, outcomes in columns.items():
            match outcomes[name]:
                case NotAsked(reason):
                    yield f"{method}: {promise.text} is not asked, {reason}"
                case Refused(reason):
                    yield f"{method}: refused, {reason}"
                case Broken(how):
                    yield f"{method}: {promise.text} FAILS, {how}"
