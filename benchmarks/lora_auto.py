"""The table of ``method: auto``: the soft adapter that did best at equal seconds on each set of the study of LoRA."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import few_shot
import timing
from kept import Content
from lora import SECONDS, Study

from softtune.experiments.cases import METHODS
from softtune.training import auto_method


def write(study: Study, records: Sequence[Content], results: Path = timing.RESULTS) -> None:
    """Write the table of what has run; it stays as it is where nothing has.

    Args:
        study: the study.
        records: the results of its runs.
        results: the folder of the other benchmarks' results, of which few_shot is read.
    """
    found = [entry for name in study.sets if (entry := best_on(study, records, name))]
    if found:
        timing.write(auto_method.TABLE, {"tasks": found + from_few(results / "few_shot.json")})


def best_on(study: Study, records: Sequence[Content], name: str) -> dict[str, Any] | None:
    """The soft adapter that did best on a set from the seeds that all have run; None where there is none."""
    by_way: dict[str, dict[int, Content]] = {}
    for record in records:
        is_run = (record["kind"], record["set"]) == (SECONDS, name) and "failure" not in record
        if is_run and study.ways[name][record["way"]].is_ours:
            by_way.setdefault(record["way"], {})[record["number"]] = record
    seeds = set.intersection(*map(set, by_way.values())) if by_way else set()
    if not seeds:
        return None
    means = {way: statistics.mean(own[seed]["value"] for seed in seeds) for way, own in by_way.items()}
    best = max(means, key=means.__getitem__)
    first = by_way[best][min(seeds)]
    title, _, _ = study.sets[name].title.partition(":")
    own = study.ways[name][best]
    case = study.fields[name]
    return {
        "title": title,
        "task": case.get("task", "CAUSAL_LM"),
        "writes": not case.get("labels"),
        "rows": first["training_rows"],
        "model": case["model"],
        "fields": {
            "method": METHODS[own.entry]["method"].value,
            "options": _for_any(own.changes["options"]),
            "learning_rate": first["learning_rate"],
        },
        "from_text": auto_method.TEXT in json.dumps(own.changes["options"]),
        "metric": first["metric"],
        "value": round(means[best], 4),
        "seeds": len(seeds),
    }


def _for_any(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the text of one task and the layers of one model."""
    kept = {name: value for name, value in options.items() if name not in (auto_method.TEXT, "layers")}
    return {**kept, "parts": [_for_any(part) for part in kept["parts"]]} if "parts" in kept else kept


def from_few(file: Path) -> list[dict[str, Any]]:
    """The entry of a few examples, where a prefix that starts from them did best."""
    if not file.is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    runs, means = content["runs"].values(), {}
    for start in few_shot.STARTS:
        means[start] = statistics.mean(run["after"] for run in runs if run["start"] == start)
    if max(means, key=means.__getitem__) != few_shot.EXAMPLES:
        return []
    return [
        {
            "title": f"{len(few_shot.TASKS)} sets with few rows",
            "task": "CAUSAL_LM",
            "writes": False,
            "rows": content["settings"]["examples"],
            "model": "smollm2-135m",
            "fields": {"method": "PREFIX_TUNING", "options": {}, "start": few_shot.EXAMPLES, "learning_rate": 1e-3},
            "from_text": False,
            "metric": "accuracy",
            "value": round(means[few_shot.EXAMPLES], 4),
            "seeds": content["settings"]["seeds"],
        }
    ]
