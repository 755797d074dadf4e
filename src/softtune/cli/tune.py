"""``softtune tune``: an adapter from a few labelled examples, by a recipe that is made for them (context tuning)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from softtune.cli.console import console, quiet
from softtune.cli.flags import option, overrides, with_flags, words
from softtune.cli.runs import run
from softtune.data import load_records
from softtune.errors import DataError
from softtune.training.fields import to_yaml
from softtune.training.recipe import AUTO, Recipe

LABEL_COLUMNS = ("label", "answer", "completion", "output", "target", "response")
"""Names of a column with answers, the first of which is taken; the last column where there is none of them."""
CONVERSATIONS = "messages"
"""Name of a column with conversations."""
LONGEST_LABEL = 3
"""Words of a label at most, where none is there twice."""
DEFAULTS = {"start": "examples", "test_size": 0, "max_length": 256, "batch_size": 8, "max_steps": 80}
"""Fields of the recipe that are other than a recipe's own defaults."""


def command(examples: str, resume: bool, push_to_hub: bool, **flags: str | None) -> None:
    """Train an adapter on a few labelled examples, which it starts from, by a recipe made for them.

    16 to 64 examples give a prefix that begins as the examples in the prompt would, and is then trained on them.
    The column with the labels, the template and the labels are found in the file; every field of the recipe is a flag.
    The recipe is shown, and kept in the adapter's folder. With --evaluation the adapter is compared with the
    examples in the prompt, by other rows. Ctrl-C saves the run for --resume.
    """
    quiet()
    changes = {**overrides(flags), **({"push_to_hub": True} if push_to_hub else {})}
    fields = {**DEFAULTS, "train": examples, "output": f"{Path(examples).stem}-adapter", **changes}
    if str(changes.get("method")).lower() == AUTO and "start" not in changes:
        del fields["start"]  # which is chosen, too
    rows = load_records(examples, split=fields.get("train_split", "train"), columns=fields.get("columns"))
    fields = {**found_in(rows, fields), **fields}
    recipe = Recipe.from_fields(fields)
    console.print(to_yaml(recipe.model_dump(mode="json", include=recipe.model_fields_set)), soft_wrap=True)
    pushing = ["--push-to-hub"] if push_to_hub else []
    run([recipe], ["tune", "--examples", examples, *words(flags), *pushing], resume=resume)


def found_in(rows: Dataset, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a recipe that its training rows suggest.

    Args:
        rows: the rows.
        fields: those that are given.

    Raises:
        DataError: the rows have no column beside the answers.
    """
    columns = rows.column_names
    if "messages" in fields or (CONVERSATIONS in columns and "template" not in fields):
        return {"messages": CONVERSATIONS}
    answers = fields.get("label_column") or next((name for name in LABEL_COLUMNS if name in columns), columns[-1])
    if not (texts := [name for name in columns if name not in (answers, fields.get("choices"))]):
        raise DataError(f"the examples have no column beside {answers!r}", "add one with the texts")
    found: dict[str, Any] = {"label_column": answers, "template": _template(texts, answers)}
    if "choices" not in fields and answers in columns and (labels := _labels(rows[answers])):
        found["labels"] = labels
    elif {"choices", "labels"}.isdisjoint(fields) and answers in columns and _resemble_labels(rows[answers]):
        warnings.warn(
            f"the answers in {answers!r} are generated as free texts, since each of them is there fewer than twice on "
            "average: name them by --labels if they are labels",
            stacklevel=2,
        )
    return found


def _template(texts: Sequence[str], answers: str) -> str:
    """A line for each column, with its name."""
    lines = [f"{_escaped(name)}: {{{name}}}\n" for name in texts]
    return "".join([*lines, f"{_escaped(answers)}: "])


def _escaped(name: str) -> str:
    return name.replace("{", "{{").replace("}", "}}")


def _labels(answers: Sequence[Any]) -> list[str]:
    """The labels among answers, each of which is there twice on average; empty where answers are free texts."""
    if not all(isinstance(answer, (str, int, float)) for answer in answers):
        return []
    different = sorted({str(answer) for answer in answers})
    return different if 2 * len(different) <= len(answers) else []


def _resemble_labels(answers: Sequence[Any]) -> bool:
    """Whether answers that are taken as free texts could be labels: one is there twice, or all are short."""
    texts = [str(answer) for answer in answers if isinstance(answer, (str, int, float))]
    is_short = all(len(text.split()) <= LONGEST_LABEL for text in texts)
    return len(texts) == len(answers) and (is_short or len({*texts}) < len(texts))


with_flags(
    command,
    [
        option("examples", str, help="The examples: a CSV, TSV, JSONL or JSON file, one a row with its answer."),
        option("resume", bool, False, help="Go on with an interrupted run."),
        option("push_to_hub", bool, False, help=str(Recipe.model_fields["push_to_hub"].description)),
    ],
    left_out=["train"],
)
