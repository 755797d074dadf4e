"""In-context learning with a few examples, the prefix that starts from them, and one that starts from common words.

    python benchmarks/few_shot.py sst2|rte [--shots N] [--steps N] [--rows N] [--seed N] [--data FOLDER] [--start START]

SmolLM2-135M, the recipes' templates and labels, N shots of each label, as many steps for both prefixes, on one thread.
In-context learning is the prefix of the examples before it is trained: with it the model has the outputs that it has
with the examples in the prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from softtune.training import Recipe, train

ROOT = Path(__file__).parents[1]
FILES = {"sst2": ("sst2/stsa.binary.train", "sst2/stsa.binary.test"), "rte": ("glue_rte/train.tsv", "glue_rte/dev.tsv")}
STARTS: dict[str, dict[str, Any]] = {
    "examples": {"start": "examples", "options": {}},
    "method": {"options": {"num_virtual_tokens": 20}},
}
"""Where each prefix starts; the learning rates are the defaults."""


def main() -> None:
    """Train by each start, and print accuracies and seconds as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=FILES)
    for name, default in (("shots", 16), ("steps", 60), ("rows", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--start", choices=STARTS, help="one of the two alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for start in [given.start] if given.start else STARTS:
        print(json.dumps({"task": given.task, "start": start, **measured(given, start)}), flush=True)


def measured(given: argparse.Namespace, start: str) -> dict[str, Any]:
    """Accuracies before and after training, and seconds of wall time and of the processor."""
    training, evaluation = (str(given.data / name) for name in FILES[given.task])
    changes = {
        "train": training,
        "evaluation": evaluation,
        "examples": None,
        "shots": given.shots,
        "evaluation_examples": given.rows,
        "max_steps": given.steps,
        "seed": given.seed,
        **STARTS[start],
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(ROOT / "recipes" / f"{given.task}.yaml", {**changes, "output": f"{folder}/adapter"})
        wall, processor = time.perf_counter(), time.process_time()
        report = train(recipe)
        return {
            "before": report.before["accuracy"],
            "after": report.after["accuracy"],
            "training": round(report.seconds),
            "all": round(time.perf_counter() - wall),
            "processor": round(time.process_time() - processor),
            "trained": report.trained,
        }


if __name__ == "__main__":
    main()
