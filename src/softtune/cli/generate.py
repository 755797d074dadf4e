"""``softtune generate``: generate text with a trained adapter, by greedy search, beam search or sampling."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softtune.cli.console import counting, quiet
from softtune.cli.flags import with_load_flags
from softtune.cli.loading import check_single, load_trained, read_records
from softtune.data.records import each_row
from softtune.errors import ConfigError
from softtune.evaluation.answers import fitted
from softtune.evaluation.predict import write_texts

NEW_TOKENS = 64
"""Maximum number of new tokens if neither the command nor the recipe sets it."""


@with_load_flags
def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    data: Annotated[str | None, typer.Argument(help="A data file, or a data set on the hub.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to go on from instead; may be repeated.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write at most.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sample at this temperature.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; 0 by default.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set; train by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, if it is elsewhere now.")] = None,
    *,
    load: Mapping[str, Any],
) -> None:
    """Write the text that follows each record, one a line."""
    quiet()
    if seed is not None and temperature is None:
        raise ConfigError("--seed draws nothing without --temperature", "give both, or neither")
    check_single(adapter)
    trained = load_trained(adapter, model, **load)
    if not trained.task.writes:
        raise ConfigError("this adapter answers by a head or a choice and writes no text", "use softtune predict")
    records = read_records(trained.recipe, data, text or [], split)
    written = max_new_tokens or trained.task.num_new_tokens or NEW_TOKENS
    task = fitted(trained.task, trained.model, written=written)
    prompts = each_row(records, task.columns, lambda record: task.prompt(record, trained.tokenizer))
    options: dict[str, Any] = {"num_beams": beams, "do_sample": temperature is not None, "max_new_tokens": written}
    if temperature is not None:
        from transformers import set_seed

        set_seed(seed or 0)
        options["temperature"] = temperature
    with counting("writing", len(prompts)) as advance:
        texts = write_texts(trained.model, trained.tokenizer, prompts, advance=advance, **options)
    if cut := sum(prompt.truncated > 0 for prompt in prompts):
        print(f"{cut} of {len(prompts)} records were cut to fit.", file=sys.stderr)
    for line in texts:
        print(" ".join(line.split()))
