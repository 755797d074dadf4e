"""Times how long softtune takes to start, beside Python with transformers and torch alone: ``make bench``.

Processor seconds of whole processes, one thread, the least of several runs in turn.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import measure, report

from softtune.pretrained import locate_base_model
from softtune.training import Recipe, train

ROUNDS = 7
PYTHON = [sys.executable, "-c"]
COMMAND = [*PYTHON, "from softtune_command import main; main()"]
ALONE = [*PYTHON, "import transformers, torch"]
PLAIN = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2)
print(model(**AutoTokenizer.from_pretrained(sys.argv[1])("red 9", return_tensors="pt")).logits.argmax())
"""
"""The same by transformers alone, with an untrained head."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter, texts = trained(Path(folder))
        started: dict[str, tuple[Sequence[str], float | None]] = {
            "import softtune": ([*PYTHON, "import softtune"], 0.5),
            "softtune --help": ([*COMMAND, "--help"], 0.1),
            "softtune train --help": ([*COMMAND, "train", "--help"], 0.15),
            "softtune predict of one text by MiniLM": ([*COMMAND, "predict", adapter, texts], 1.6),
            "a text by transformers and MiniLM": ([*PYTHON, PLAIN, locate_base_model("minilm")], None),
        }
        found: dict[str, list[float]] = {name: [] for name in ("alone", *started)}
        for _ in range(ROUNDS):
            found["alone"].append(seconds(ALONE))
            for name, (command, _) in started.items():
                found[name].append(seconds(command))
    alone = min(found["alone"])
    measures = [measure('seconds of python -c "import transformers, torch"', alone, None)]
    measures += [measure(f"{name} / that", min(found[name]) / alone, must) for name, (_, must) in started.items()]
    report("startup", measures)


def trained(folder: Path) -> tuple[str, str]:
    """A MiniLM adapter and a file of one text, in a folder."""
    rows = [
        {"text": f"{word} {number}", "label": label} for number in range(8) for word, label in (("red", 0), ("blue", 1))
    ]
    for name, given in (("train", rows), ("one", [{"text": "red 9"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    fields: dict[str, Any] = {"model": "minilm", "task": "SEQ_CLS", "method": "P_TUNING_V2", "template": "{text}"}
    fields |= {"label_column": "label", "labels": ["0", "1"], "max_steps": 1, "options": {"num_virtual_tokens": 4}}
    train(Recipe.from_fields({**fields, "train": str(folder / "train.jsonl"), "output": str(folder / "adapter")}))
    return str(folder / "adapter"), str(folder / "one.jsonl")


def seconds(command: Sequence[str]) -> float:
    """Processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
