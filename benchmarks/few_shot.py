"""In-context learning with a few examples, the prefix that starts from them, and prefixes that start from nothing of
them.

    python benchmarks/few_shot.py [sst2|rte|clinc ...] [--examples N] [--steps N] [--rows N] [--seeds N] [--data FOLDER]

SmolLM2-135M, the recipes' templates and labels, as many examples of each label, as many steps for all prefixes, on one
thread. CLINC has eight intents, which the model writes. In-context learning is the prefix of the examples before it is
trained: with it the model has the outputs that it has with the examples in the prompt.

Each run is saved in runs/few_shot, and several processes may share them. The means over tasks and seeds are shown when
all that are named have run, and written to results/few_shot.json where these are all tasks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import intents
import timing
import torch
from kept import Content, Kept

from softtune.training import Recipe, train

ROOT = Path(__file__).parents[1]
FILES = {"sst2": ("sst2/stsa.binary.train", "sst2/stsa.binary.test"), "rte": ("glue_rte/train.tsv", "glue_rte/dev.tsv")}
TASKS = (*FILES, "clinc")
INTENTS = 8
EXAMPLES, RANDOM = "examples", "random"
STARTS: dict[str, dict[str, Any]] = {
    EXAMPLES: {"start": "examples", "options": {}},
    "words": {"options": {"num_virtual_tokens": 20}},
    RANDOM: {"options": {"num_virtual_tokens": 20, "init_weights": "random"}},
}
"""Where each prefix starts; the learning rates are the defaults."""
AHEAD = 0.05
"""How far a prefix from the examples must be ahead of the others."""


def main() -> None:
    """Train by each start, and report accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*")
    for name, default in (("examples", 32), ("steps", 60), ("rows", 200), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", type=Path, default=Path("data"))
    given = parser.parse_args()
    tasks = timing.chosen(parser, given.tasks, TASKS)
    torch.set_num_threads(1)
    found = run(Kept(ROOT / "runs" / "few_shot"), tasks, given)
    if len(found) < len(tasks) * len(STARTS) * given.seeds:
        raise SystemExit("other processes run the rest: the same command shows the means when they have ended")
    settings = {name: getattr(given, name) for name in ("examples", "steps", "rows", "seeds")}
    measures = measures_of([*found.values()], tasks)
    timing.show("few_shot", measures)
    if {*tasks} == {*TASKS}:
        timing.save("few_shot", {"settings": settings, "measures": measures, "runs": found})


def run(kept: Kept, tasks: Sequence[str], given: argparse.Namespace) -> dict[str, Content]:
    """Run what is left. Returns the results that are there."""
    found: dict[str, Content] = {}
    for task in tasks:
        fields = fields_of(task, given.data, kept.folder / "data")
        for seed in range(given.seeds):
            for start in STARTS:
                name = f"{task}.{start}.{seed}"
                shots = given.examples // len(fields["labels"])
                asked = {"shots": shots, "steps": given.steps, "rows": given.rows}
                changes = {"shots": shots, "max_steps": given.steps, "evaluation_examples": given.rows, "seed": seed}
                kept.check(name, asked)
                about = {"task": task, "start": start, "seed": seed, "asked": asked}
                kept.once(name, partial(measured, {**fields, **changes, **STARTS[start]}, about))
                if (result := kept.get(name)) is not None:
                    found[name] = result
    return found


def fields_of(task: str, data: Path, files: Path) -> dict[str, Any]:
    """A recipe's fields.

    Args:
        task: one of ``TASKS``.
        data: the folder with the data sets.
        files: where rows are written that the data sets do not have as such.
    """
    if task in FILES:
        training, evaluation = (str(data / name) for name in FILES[task])
        recipe = Recipe.load(ROOT / "recipes" / f"{task}.yaml").model_dump(exclude_unset=True)
        return {**recipe, "train": training, "evaluation": evaluation, "examples": None}
    words = {name: name.replace("_", " ") for name in intents.chosen(data, INTENTS)}
    intents.write(data, files / task, words)
    return {
        "model": "smollm2-135m",
        "train": str(files / task / "train.jsonl"),
        "evaluation": str(files / task / "test.jsonl"),
        "template": "Request: {text}\nIntent: ",
        "label_column": "intent",
        "labels": list(words.values()),
        "max_length": 64,
        "batch_size": 8,
    }


def measured(fields: Mapping[str, Any], about: Mapping[str, Any]) -> Content:
    """Accuracies before and after training, and seconds of wall time and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        report = train(Recipe.from_fields({**fields, "output": f"{folder}/adapter"}))
        return {
            **about,
            **timing.stamp(),
            "before": report.before["accuracy"],
            "after": report.after["accuracy"],
            "training": round(report.seconds),
            "all": round(time.perf_counter() - wall),
            "processor": round(time.process_time() - processor),
            "trained": report.trained,
        }


def measures_of(runs: Sequence[Content], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Means over tasks and seeds, and the accuracies of each task."""

    def mean(start: str, when: str, names: Sequence[str]) -> float:
        return statistics.mean(run[when] for run in runs if run["start"] == start and run["task"] in names)

    ways = {"in-context learning": (EXAMPLES, "before"), "a prefix from the examples": (EXAMPLES, "after")}
    ways |= {f"a prefix from {start}": (start, "after") for start in STARTS if start != EXAMPLES}
    own, whole = mean(EXAMPLES, "after", tasks), set(tasks) == set(TASKS)
    gaps = [("in-context learning", AHEAD), ("a prefix from random", AHEAD), ("a prefix from words", None)]
    return [
        *(
            timing.measure(
                f"accuracy of a prefix from the examples - {other}, mean of {', '.join(tasks)}",
                own - mean(*ways[other], tasks),
                must if whole else None,
                at_least=True,
            )
            for other, must in gaps
        ),
        *(
            timing.measure(f"{task}: accuracy of {way}", mean(*which, [task]), None)
            for task in tasks
            for way, which in ways.items()
        ),
    ]


if __name__ == "__main__":
    main()
