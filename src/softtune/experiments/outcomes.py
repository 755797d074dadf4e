"""What experiments come to, and the folder that keeps it.

Knows nothing about models or how anything is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softtune import storage
from softtune.errors import ConfigError, TrainingError, UnsupportedModelError
from softtune.training.folder import ENTRIES_NAME
from softtune.wording import shortened

SWEEP_NAME = "sweep.yaml"
"""A sweep, in its folder; a comparison's has none."""

LONGEST_STEM = 60
"""Characters of a file's name that come from an entry's."""
LONGEST_VALUE = 60
"""Characters of a value in a message."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to."""

    metrics: dict[str, float]
    trained: int
    """Numbers that were trained."""
    total: int
    """All numbers of the model."""
    stored: int
    """Bytes of the tensors that a task needs beside the base model."""
    seconds: float
    """Of training alone; 0 of runs that trained at once, or not at all."""
    memory: int
    """Most bytes in use while training, the base model's among them; 0 as for the seconds."""
    steps: int
    training_rows: int
    evaluation_rows: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a comparison, or one point of a sweep."""

    name: str
    at: dict[str, Any] = field(default_factory=dict)
    """The point: what tells it from the others, by axis."""
    outcomes: list[Outcome]
    """One a seed; empty where it failed."""
    failure: str = ""
    """Why it failed, or does not go with this task or base model."""
    failed_by: str = ""
    """The name of the error's class, where there is a failure."""

    @property
    def is_final(self) -> bool:
        """Whether the same would come of another run: it has outcomes, or is a training that blew up."""
        return not self.failure or self.failed_by == TrainingError.__name__

    @property
    def is_left_out(self) -> bool:
        """Whether it does not go with this task or base model, which nobody needs to mend."""
        return self.failed_by == UnsupportedModelError.__name__

    @property
    def metrics(self) -> list[str]:
        """Their names, the task's first one first."""
        return [*self.outcomes[0].metrics] if self.outcomes else []

    def values(self, metric: str) -> list[float]:
        """One a seed."""
        return [outcome.metrics[metric] for outcome in self.outcomes]

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return statistics.mean(self.values(metric))

    def cost(self, name: str) -> float:
        """The mean over seeds of one of the outcomes' own numbers."""
        return statistics.mean(float(getattr(outcome, name)) for outcome in self.outcomes)

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds; 0 of one."""
        return statistics.stdev(self.values(metric)) if len(self.outcomes) > 1 else 0.0


def entry_of(content: Mapping[str, Any]) -> Entry:
    """An entry of what ``dataclasses.asdict`` made of it."""
    return Entry(**{**content, "outcomes": [Outcome(**outcome) for outcome in content["outcomes"]]})


def entries_of(folder: Path) -> list[Entry]:
    """Those that an experiment has kept in a folder, in its order."""
    files = [storage.read_json(file) for file in (folder / ENTRIES_NAME).glob("*.json")]
    return [entry for file in sorted(files, key=lambda file: file["number"]) for entry in _entries(file)]


def keep(folder: Path, stem: str, number: int, asked: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Write what a part of an experiment came to, metrics and axes in their order: the first ones are the foremost.

    Args:
        folder: of the experiment.
        stem: the file's name without its ending.
        number: the part's place among the others.
        asked: what was run.
        entries: what it came to.
    """
    content = {"number": number, "asked": asked, "entries": [dataclasses.asdict(entry) for entry in entries]}
    with storage.staged(folder / ENTRIES_NAME) as stage:
        (stage / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def kept(folder: Path, stem: str, asked: Mapping[str, Any]) -> list[Entry] | None:
    """What the same part came to in an earlier run; None where there was none, or it failed by what may be mended now.

    Raises:
        ConfigError: it is of another experiment.
    """
    file = _file(folder, stem)
    if not file.is_file():
        return None
    found = storage.read_json(file)
    if not _is_final(found):
        return None
    check_same(folder, found["asked"], asked)
    return _entries(found)


def check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError where what an experiment came of is not what is asked for."""
    other = [name for name in now if then.get(name) != now[name]]
    if other == ["rows"]:
        raise ConfigError(f"the data is not what {folder} came of: restore it, or name another output")
    if other and isinstance(now[other[0]], Mapping):
        check_same(folder, then.get(other[0]) or {}, now[other[0]])
    if other:
        was, is_now = (shortened(repr(asked.get(other[0])), LONGEST_VALUE) for asked in (then, now))
        says = f"differs in its {other[0]}, {was} then and {is_now} now"
        raise ConfigError(f"the experiment in {folder} {says}: name another output, or delete it")


def forget_failures(folder: Path) -> None:
    """Remove what an experiment keeps of parts that may come to something in another run."""
    for file in (folder / ENTRIES_NAME).glob("*.json"):
        if not _is_final(storage.read_json(file)):
            file.unlink()


def asked_of(folder: Path) -> list[dict[str, Any]]:
    """What was run of each part of an experiment that came to something."""
    files = [storage.read_json(file) for file in (folder / ENTRIES_NAME).glob("*.json")]
    return [file["asked"] for file in files if _is_final(file)]


def came_to(folder: Path, stem: str) -> list[Entry]:
    """What a part of an experiment that has run came to, failures too."""
    return _entries(storage.read_json(_file(folder, stem)))


def said(axis: str, value: Any) -> str:
    """A value on an axis as points' names have it: with the axis, unless it is a word, which speaks for itself."""
    return value if isinstance(value, str) and not re.fullmatch(r"[-+.\d]+(e[-+\d]+)?", value) else f"{axis} {value}"


def stem_of(name: str) -> str:
    """A name as a file's: the same where it can be, else with a digest that tells it from others like it."""
    plain = re.sub(r"[^\w.=+-]+", "_", name)
    if plain == name and len(plain) <= LONGEST_STEM:
        return name
    return f"{plain[:LONGEST_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _file(folder: Path, stem: str) -> Path:
    return folder / ENTRIES_NAME / f"{stem}.json"


def _is_final(file: Mapping[str, Any]) -> bool:
    return all(entry.is_final for entry in _entries(file))


def _entries(file: Mapping[str, Any]) -> list[Entry]:
    return [entry_of(entry) for entry in file["entries"]]
