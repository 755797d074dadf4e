"""Some of CLINC's 150 intents as files with a row a line: ``text`` and ``intent``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

SOURCE = "clinc_oos/data_small.json"
EVERY = 7
"""Intents stand in alphabetical order, in which like ones are neighbours; every seventh is taken."""


def chosen(data: Path, count: int) -> list[str]:
    """``count`` of the intents, at most 22, from the folder with the data sets."""
    return sorted({intent for _, intent in _splits(data)["train"]})[::EVERY][:count]


def write(data: Path, folder: Path, labels: Mapping[str, str]) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with the rows of some intents.

    Args:
        data: the folder with the data sets.
        folder: where the files are written.
        labels: what is written for each intent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": text, "intent": labels[name]} for text, name in _splits(data)[split] if name in labels]
        unfinished = folder / f"{split}.{os.getpid()}"  # several processes may write the same at once
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(folder / f"{split}.jsonl")


def _splits(data: Path) -> dict[str, list[tuple[str, str]]]:
    splits: dict[str, list[tuple[str, str]]] = json.loads((data / SOURCE).read_text(encoding="utf-8"))
    return splits
