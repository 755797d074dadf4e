"""Writes ``docs/benchmarks.md``: tables of all results in ``results/``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from timing import RESULTS, machine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SECTIONS = {
    "core": "A step and generation",
    "training": "Training and scoring",
    "precision": "Training in bfloat16, and on long rows",
    "startup": "Starting",
    "serving": "Many adapters served",
    "engines": "Two engines",
    "modes": "Gradient checkpointing, bfloat16, compilation",
    "quantised": "Quantised base models",
    "gpu": "On a GPU",
    "steps_sms_spam": "Half of the steps: SMS spam",
    "steps_sst2": "Half of the steps: SST-2",
    "steps_methods": "Learning rates by method: SMS spam",
    "steps_variants": "Schedules, starts, numbers of virtual tokens: SMS spam",
}


def main() -> None:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, `make bench-serve`, `make bench-vllm`, `make bench-quant` and `make bench-steps`,",
        "from [benchmarks/results](../benchmarks/results), with the packages of the commit's constraints.txt.",
        "Sections of `be74683` are of transformers 5.24.0 and peft 0.21.2, which trains there as before; what it",
        "generates with a prefix is the base model's text (see [Coming from PEFT](peft.md)), as fast as that.",
        "",
    ]
    for name, title in SECTIONS.items():
        if (file := RESULTS / f"{name}.json").exists():
            lines += section(title, json.loads(file.read_text(encoding="utf-8")))
        if name == "training":
            lines += [
                "![growth of a step in tokens, virtual tokens and adapters](../benchmarks/results/growth.png)",
                "",
            ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def section(title: str, results: dict[str, Any]) -> Iterator[str]:
    yield from (f"## {title}", "")
    yield from (f"{machine(results['hardware'])}, commit `{results['commit']}`.", "")
    yield from measures(results["measures"]) if "measures" in results else runs(results["runs"])
    yield ""


def measures(found: list[dict[str, Any]]) -> Iterator[str]:
    yield from table(
        ["measure", "value", "must be", "holds"],
        (
            [m["measure"], f"{m['value']:.3f}", m["must"] or "", {True: "yes", False: "no", None: ""}[m["holds"]]]
            for m in found
        ),
    )


def runs(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Means over seeds, with minimum and maximum."""
    rows = []
    for name, seeds in found.items():
        cells = [_spread([seed[metric] for seed in seeds]) for metric in ("accuracy", "balanced_accuracy")]
        rows.append([name, str(seeds[0]["steps"]), *cells, str(len(seeds))])
    yield from table(["run", "steps", "accuracy", "balanced accuracy", "seeds"], rows)


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield from (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
