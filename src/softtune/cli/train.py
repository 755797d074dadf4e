"""``softtune train``: run a recipe. Every field of the recipe is also a flag."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from softtune.cli.console import console, in_units, progress_bars, quiet, show_pairs
from softtune.errors import ConfigError, TrainingError
from softtune.methods import TaskType
from softtune.pretrained import MODEL_CLASSES
from softtune.training import run
from softtune.training.learning_rate import RangeTest
from softtune.training.profile import Profile
from softtune.training.recipe import Recipe
from softtune.training.run import Report, train_all

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def command(recipes: list[str], resume: bool, profile: bool, find_learning_rate: bool, **flags: str | None) -> None:
    """Train an adapter by a recipe, or those of several recipes at once, and show what came of it.

    Recipes that share a base model take less time and memory together than one after the other; a flag goes for all of
    them. Ctrl-C saves the runs for --resume.
    """
    quiet()
    overrides = {name: _value(name, text) for name, text in flags.items() if text is not None}
    chosen = [Recipe.load(recipe, overrides) for recipe in recipes]
    if profile or find_learning_rate:
        if len(chosen) > 1:
            raise ConfigError("one recipe is measured at a time: name one")
        with console.status("measuring"):
            profiled = run.profile_recipe(chosen[0]) if profile else None
            tested = run.find_learning_rate(chosen[0]) if find_learning_rate else None
        if profiled is not None:
            show_profile(profiled)
        if tested is not None:
            show_range_test(tested)
        return
    with progress_bars() as progress:
        results = train_all(chosen, resume=resume, progress=progress)
    reports = [result for result in results if isinstance(result, Report)]
    if unfinished := [report for report in reports if not report.finished]:
        again = [part for name, text in flags.items() if text is not None for part in (_flag(name), text)]
        words = shlex.join(["softtune", "train", *recipes, *again, "--resume"])
        steps = max(report.steps for report in unfinished)
        console.print(f"Stopped after step {steps}. Go on with: {escape(words)}", soft_wrap=True)
        sys.exit(INTERRUPTED)
    for report in reports:
        show_report(report, title=escape(str(report.folder)) if len(results) > 1 else "")
    _raise_failures(chosen, results)


def _raise_failures(recipes: Sequence[Recipe], results: Sequence[Report | TrainingError]) -> None:
    """Raise TrainingError where a run failed; of several, it says which."""
    failed = [
        (recipe, result) for recipe, result in zip(recipes, results, strict=True) if not isinstance(result, Report)
    ]
    if failed and len(results) == 1:
        raise failed[0][1]
    if failed:
        raise TrainingError("; ".join(f"{recipe.output}: {error}" for recipe, error in failed))


def show_report(report: Report, title: str = "") -> None:
    """The table at the end of a run."""
    pairs = [pair for name in report.after for pair in _quality(report, name)]
    pairs += [
        ("trained on", f"{_rows(report.training_rows, report.truncated)}, {report.steps} steps"),
        *([("stopped by", _rows(report.validation_rows, 0))] if report.validation_rows else []),
        ("evaluated on", _rows(report.evaluation_rows, report.evaluation.truncated)),
        ("trained parameters", f"{report.trained:,} of {report.total:,} ({report.trained / report.total:.3%})"),
        ("adapter", f"{report.folder} ({in_units(report.size)})"),
        ("training", f"{report.seconds:.0f} s"),
    ]
    show_pairs(title, pairs)


def show_profile(profile: Profile) -> None:
    """Where a step's time goes, and what it could not go below."""
    table = Table("", "ms", "of a step", title="A training step", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(f"all of it, {profile.tokens} tokens", f"{1000 * profile.seconds:.1f}", "100%", end_section=True)
    for kind, share in sorted(profile.shares.items(), key=lambda pair: -pair[1]):
        table.add_row(kind, f"{1000 * share * profile.seconds:.1f}", f"{share:.0%}")
    table.add_section()
    limits = {"its matrix products alone": profile.products, "reading the weights twice": profile.weights}
    for name, seconds in limits.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{seconds / profile.seconds:.0%}")
    console.print(table)
    console.print(
        f"{profile.tokens / profile.seconds:.0f} tokens/s, "
        f"{profile.seconds / max(limits.values()):.2f} times the higher limit."
    )


def show_range_test(test: RangeTest) -> None:
    """Losses by learning rate, as bars."""
    table = Table("learning rate", "loss", "", title="Losses of steps with ever higher rates", title_justify="left")
    highest = max(test.losses)
    for rate, loss in zip(test.rates, test.losses, strict=True):
        mark = "  lowest" if rate == test.lowest else ""
        table.add_row(f"{rate:.1e}", f"{loss:.3f}", "█" * round(40 * loss / highest) + mark)
    console.print(table)
    console.print(f"Try --learning-rate {test.suggestion:.0e}, a third of the rate at which the loss was lowest.")


def _quality(report: Report, metric: str) -> Iterator[tuple[str, str]]:
    """A metric's lines in the table: before and after and, of an ensemble, the vote's and its members'."""
    label, found = metric.replace("_", " "), report.evaluation
    yield label, f"{report.before[metric]:.1%} before, {report.after[metric]:.1%} after"
    if found.members:
        members = [member[metric] for member in found.members]
        yield f"{label} by vote", f"{found.vote[metric]:.1%}"
        yield (
            f"{label} of one",
            f"{min(members):.1%} to {max(members):.1%}, {sum(members) / len(members):.1%} on average",
        )


def _rows(count: int, truncated: int) -> str:
    return f"{count} rows, {truncated} of them cut to fit" if truncated else f"{count} rows"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(name: str, text: str) -> Any:
    """A flag's text as the field's type wants it: texts as they are, all else read as YAML."""
    if Recipe.model_fields[name].annotation in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_flag(name)} {text!r} cannot be read: write it as in a YAML file") from error


def _choices(annotation: Any) -> list[str]:
    """The values that a field can have, where they can be listed."""
    if annotation is TaskType:
        return [task.value for task in MODEL_CLASSES]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def _signature() -> Signature:
    """``command``'s parameters with a flag for every field of the recipe, as typer reads them."""
    recipes = Annotated[list[str], typer.Argument(help="The recipe, a YAML file; or several that share a base model.")]
    resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
    measured = {
        "profile": "Measure where a step's time goes, and save nothing.",
        "find_learning_rate": "Try ever higher learning rates for 40 steps, and save nothing.",
    }
    parameters = [
        Parameter("recipes", Parameter.POSITIONAL_OR_KEYWORD, annotation=recipes),
        Parameter("resume", Parameter.KEYWORD_ONLY, annotation=resume, default=False),
    ]
    for name, text in measured.items():
        option = typer.Option(_flag(name), help=text)
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[bool, option], default=False))
    for name, field in Recipe.model_fields.items():
        choices = _choices(field.annotation)
        listed = f" One of {', '.join(choices)}." if choices else ""
        shown = field.default.value if isinstance(field.default, Enum) else field.default
        default = "" if field.is_required() or shown is None else f" [default: {shown}]"
        option = typer.Option(_flag(name), help=escape(f"{field.description}{listed}{default}"))
        parameters.append(
            Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[str | None, option], default=None)
        )
    return Signature(parameters)


command.__signature__ = _signature()  # type: ignore[attr-defined]
command.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
