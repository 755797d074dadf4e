"""``softtune distill``: distil a text into a cartridge, a trained KV prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from softtune.cli.console import console, progress_bars, quiet
from softtune.cli.flags import with_load_flags
from softtune.distillation import Distillation, DistillationReport, distill
from softtune.formatting import in_units
from softtune.load_options import LoadOptions

FIELDS = Distillation.model_fields


def _option(name: str, **options: Any) -> Any:
    return typer.Option(help=FIELDS[name].description, **options)


@with_load_flags
def command(
    corpus: Annotated[str | None, typer.Argument(help=FIELDS["corpus"].description)] = None,
    *,
    model: Annotated[str, _option("model")],
    output: Annotated[str, _option("output")],
    text: Annotated[str | None, _option("text")] = None,
    role: Annotated[str | None, _option("role")] = None,
    tokens: Annotated[int, _option("tokens", min=1)] = FIELDS["tokens"].default,
    teacher: Annotated[str | None, _option("teacher")] = None,
    questions: Annotated[str | None, _option("questions")] = None,
    seed_prompts: Annotated[str | None, _option("seed_prompts")] = None,
    num_questions: Annotated[int, _option("num_questions", min=1)] = FIELDS["num_questions"].default,
    steps: Annotated[int, _option("steps", min=1)] = FIELDS["steps"].default,
    batch_size: Annotated[int, _option("batch_size", min=1)] = FIELDS["batch_size"].default,
    learning_rate: Annotated[float, _option("learning_rate")] = FIELDS["learning_rate"].default,
    top_k: Annotated[int, _option("top_k", min=1)] = FIELDS["top_k"].default,
    chunk_tokens: Annotated[int, _option("chunk_tokens", min=1)] = FIELDS["chunk_tokens"].default,
    max_answer_tokens: Annotated[int, _option("max_answer_tokens", min=1)] = FIELDS["max_answer_tokens"].default,
    cache_mb: Annotated[float, _option("cache_mb")] = FIELDS["cache_mb"].default,
    save_steps: Annotated[int, _option("save_steps", min=1)] = FIELDS["save_steps"].default,
    seed: Annotated[int, _option("seed")] = FIELDS["seed"].default,
    load: Mapping[str, Any],
) -> None:
    """Distil a text into a cartridge: a trained KV prefix that answers about the text without reading it.

    The model asks itself questions about the text, and the cartridge learns what the model expects of the answers with
    the text in its context. What is done is kept, so that the same command goes on after Ctrl-C. The folder is an
    adapter's.
    """
    given = {name: value for name, value in locals().items() if name in FIELDS and name != "load"}
    quiet()
    settings = Distillation(**given, load=LoadOptions(**load))
    with progress_bars() as progress:
        report = distill(settings, progress=progress)
    _show(report)


def _show(report: DistillationReport) -> None:
    """Print the table of a distillation, and below it why a method is not in it."""
    kind = "known answers" if report.is_known else "answers of the model with the text in its context"
    table = Table(
        *("", "tokens", "KV", "reading", "a request", "contains the answer", "F1"),
        title=f"{report.questions} questions with {kind}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for result in report.results:
        if not result.note:
            table.add_row(
                result.name,
                f"{result.tokens:.0f}",
                in_units(result.kv_bytes),
                f"{result.reading:.2f} s",
                f"{result.seconds:.2f} s",
                f"{result.accuracy:.0%}",
                f"{result.f1:.1%}",
            )
    console.print(table)
    for result in report.results:
        if result.note:
            console.print(f"{result.name}: {result.note}", soft_wrap=True)
    parts = "whole" if report.chunks == 1 else f"in {report.chunks} chunks"
    console.print(
        f"The text was read {parts}. {report.conversations} conversations, {report.steps} steps: divergence from "
        f"{report.first_loss:.3f} to {report.last_loss:.3f} nats a token. The cartridge is {report.folder}.",
        soft_wrap=True,
    )
