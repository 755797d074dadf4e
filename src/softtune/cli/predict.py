"""``softtune predict``: predict labels or generate answers for records with a trained adapter."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset
from rich.table import Table

from softtune import storage
from softtune.cli.console import console, counting, quiet
from softtune.cli.flags import with_load_flags
from softtune.cli.loading import Trained, load_trained, read_records
from softtune.cli.tables import in_cell, show_mistakes, show_quality
from softtune.data.records import each_row
from softtune.errors import ConfigError, DataError
from softtune.evaluation.answers import Answers, judge
from softtune.evaluation.ensemble import answer_each, by_mean, by_vote
from softtune.tasks import Task
from softtune.tasks.texts import alike, with_all_references
from softtune.training.recipe import Recipe

SHOWN = 20
"""Maximum number of rows to show."""
ENDINGS = (".csv", ".jsonl")
"""The supported endings of output files."""
VOTE = """Of an ensemble, take the answer that most members give; its probability is then the share of votes. Between
labels with as many votes the mean probability decides, between texts or tags the earliest member."""


@with_load_flags
def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    data: Annotated[str | None, typer.Argument(help="A data file, or a data set on the hub.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to answer instead; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all answers to this CSV or JSONL file.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set; train by default.")] = None,
    vote: Annotated[bool, typer.Option("--vote", help=VOTE)] = False,
    model: Annotated[str | None, typer.Option(help="Base model, if it is elsewhere now.")] = None,
    *,
    load: Mapping[str, Any],
) -> None:
    """Answer records with a trained adapter; measure the answers where the records have labels.

    The members of an ensemble answer together, by the mean of their probabilities.
    """
    quiet()
    with _written(output) as write:
        recipe = Recipe.from_adapter(adapter)
        given = read_records(recipe, data, text or [], split)
        records = _checked(recipe.definition, given)
        trained = load_trained(adapter, model, **load)
        if vote and len(trained.names) == 1:
            raise ConfigError(f"{adapter} has one adapter, which has no one to vote with", "leave out --vote")
        answers = _answers(trained, records, vote=vote)
        answered = _with_answers(records, answers)
        write(answered)
    _show(answered, trained.task.columns, output)
    if len(records) < len(given):
        console.print(f"{len(given)} records, of which {len(records)} are different: others add references to these.")
    if answers.truncated:
        console.print(f"{answers.truncated} of {len(records)} records were cut to fit.")
    if (task := trained.task).has_references(records):
        quality = judge(task, records, answers)
        show_quality(quality)
        columns = [*dict.fromkeys([*task.columns, task.label_column, "answer"])]
        show_mistakes(quality, answered, columns, _rows(task, given))


@contextmanager
def _written(output: Path | None) -> Iterator[Callable[[Dataset], None]]:
    """Yield a function that writes the answers to ``output``, if it is given.

    The file appears when the block ends without an error. Its name and folder are checked before any work is done.

    Raises:
        ConfigError: ``output`` is a folder, or its ending is not supported.
    """
    if output is None:
        yield lambda answered: None
        return
    if output.is_dir():
        raise ConfigError(f"{output} is a folder", "name a CSV or JSONL file to write the answers to")
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{output} is neither CSV nor JSONL", f"let its name end in {' or '.join(ENDINGS)}")
    with storage.staged(output.parent) as stage:
        yield lambda answered: _write(answered, stage / output.name)


def _write(answered: Dataset, file: Path) -> None:
    """Write JSON lines or CSV, by the file's ending; in CSV lists and dicts are JSON."""
    if file.suffix.lower() == ".jsonl":
        answered.to_json(file, force_ascii=False)
        return
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(answered.column_names)
        rows.writerows([_cell(record[name]) for name in answered.column_names] for record in answered)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def _checked(task: Task, records: Dataset) -> Dataset:
    """Check the records before any work is done, and merge a text task's records with the same input.

    A merged record has the references of all of them. Without a label column nothing is merged.

    Raises:
        DataError: the data has a column ``answer`` or ``probability``, or a label that cannot be evaluated.
    """
    if taken := {"answer", "probability"} & set(records.column_names):
        raise DataError(f"the data has a column {min(taken)!r}, where the answers go", "rename it")
    if not task.has_references(records):
        return records
    try:
        each_row(records, [*task.columns, task.label_column], task.reference)
    except DataError as error:
        if task.label_column in task.columns:
            raise
        raise DataError(f"{error}; or leave out the column {task.label_column!r}, and nothing is measured") from error
    return with_all_references(records, task) if task.merges_references else records


def _rows(task: Task, records: Dataset) -> Sequence[int]:
    """The row of each answer, from 0; for merged records that of the first one."""
    return [rows[0] for rows in alike(records, task.columns)] if task.merges_references else range(len(records))


def _answers(trained: Trained, records: Dataset, *, vote: bool) -> Answers:
    """The answers of the adapter, or those of an ensemble's members combined."""
    names = trained.names
    with counting("predicting", len(names) * len(records)) as advance:
        members = answer_each(trained.model, trained.tokenizer, trained.task, records, names=names, advance=advance)
    if len(members) == 1:
        return members[0]
    return (by_vote if vote or members[0].scores is None else by_mean)(trained.task, members)


def _with_answers(records: Dataset, answers: Answers) -> Dataset:
    """Add a column for the answers and, if labels were scored, one for their probabilities."""
    column = [list(text) if isinstance(text, tuple) else text for text in answers.texts]
    answered = records.add_column("answer", column)
    if answers.scores is None:
        return answered
    return answered.add_column("probability", answers.scores.softmax(1).amax(1).tolist())


def _show(answered: Dataset, fields: tuple[str, ...], output: Path | None) -> None:
    table = Table()
    columns = [c for c in (*fields, "answer", "probability") if c in answered.column_names]
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=False)
    for record in answered.select(range(min(SHOWN, len(answered)))):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else in_cell(v) for v in map(record.get, columns)))
    console.print(table)
    if len(answered) > SHOWN:
        place = f"all of them are in {output}" if output else "write all of them to a file with --output"
        console.print(f"{SHOWN} of {len(answered)} records; {place}.")
