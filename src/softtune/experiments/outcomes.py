"""Results of experiments, and the folder that holds them.

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
from softtune.formatting import shortened
from softtune.training.folder import ENTRIES_NAME

SWEEP_NAME = "sweep.yaml"
"""File name of a sweep in its folder; the folder of a comparison has none."""

LONGEST_STEM = 60
"""Characters of a file name that are taken from an entry's name."""
LONGEST_VALUE = 60
"""Characters of a value in a message."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of one run."""

    metrics: dict[str, float]
    trained: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters of the model."""
    stored: int
    """Bytes of the tensors that a task needs in addition to the base model."""
    seconds: float
    """Training time; 0 for runs that trained at once with others, or not at all."""
    memory: int
    """Peak bytes in use while training, including the base model; 0 where ``seconds`` is."""
    steps: int
    training_rows: int
    evaluation_rows: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a comparison, or one point of a sweep."""

    name: str
    at: dict[str, Any] = field(default_factory=dict)
    """The point of the sweep: a value by axis."""
    outcomes: list[Outcome]
    """One per seed; empty where it failed."""
    failure: str = ""
    """Why it failed, or does not fit this task or base model."""
    failed_by: str = ""
    """Class name of the error, where there is a failure."""

    @property
    def is_final(self) -> bool:
        """Whether another run would give the same result: it has outcomes, or its training diverged."""
        return not self.failure or self.failed_by == TrainingError.__name__

    @property
    def is_left_out(self) -> bool:
        """Whether it does not fit this task or base model, which is no error to fix."""
        return self.failed_by == UnsupportedModelError.__name__

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, the task's main one first."""
        return [*self.outcomes[0].metrics] if self.outcomes else []

    def values(self, metric: str) -> list[float]:
        """One value per seed."""
        return [outcome.metrics[metric] for outcome in self.outcomes]

    def mean(self, metric: str) -> float:
        """Mean over seeds."""
        return statistics.mean(self.values(metric))

    def cost(self, name: str) -> float:
        """Mean over seeds of a field of the outcomes, such as ``seconds``."""
        return statistics.mean(float(getattr(outcome, name)) for outcome in self.outcomes)

    def spread(self, metric: str) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.values(metric)) if len(self.outcomes) > 1 else 0.0


def entry_of(content: Mapping[str, Any]) -> Entry:
    """An entry from its ``dataclasses.asdict`` form."""
    return Entry(**{**content, "outcomes": [Outcome(**outcome) for outcome in content["outcomes"]]})


def entries_of(folder: Path) -> list[Entry]:
    """The entries saved in an experiment's folder, in the experiment's order."""
    files = [storage.read_json(file) for file in (folder / ENTRIES_NAME).glob("*.json")]
    return [entry for file in sorted(files, key=lambda file: file["number"]) for entry in _entries(file)]


def keep(folder: Path, stem: str, number: int, asked: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Save the results of a case. Metrics and axes keep their order, since the first ones are the main ones.

    Args:
        folder: the experiment's folder.
        stem: the file name without its suffix.
        number: the case's position among the cases of the experiment.
        asked: the case's configuration.
        entries: the case's results.
    """
    content = {"number": number, "asked": asked, "entries": [dataclasses.asdict(entry) for entry in entries]}
    with storage.staged(folder / ENTRIES_NAME) as stage:
        (stage / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def kept(folder: Path, stem: str, asked: Mapping[str, Any]) -> list[Entry] | None:
    """The saved results of a case from an earlier run; None where there are none, or where it failed and may be run
    again.

    Raises:
        ConfigError: the results are of another experiment.
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
    """Check that saved results have the requested configuration.

    Raises:
        ConfigError: they have another one.
    """
    other = [name for name in now if then.get(name) != now[name]]
    if other == ["rows"]:
        raise ConfigError(f"the data is not what {folder} came of: restore it, or name another output")
    if other and isinstance(now[other[0]], Mapping):
        check_same(folder, then.get(other[0]) or {}, now[other[0]])
    if other:
        was, is_now = (shortened(repr(config.get(other[0])), LONGEST_VALUE) for config in (then, now))
        says = f"differs in its {other[0]}, {was} then and {is_now} now"
        raise ConfigError(f"the experiment in {folder} {says}: name another output, or delete it")


def forget_failures(folder: Path) -> None:
    """Remove the saved results of failed cases that may be run again."""
    for file in (folder / ENTRIES_NAME).glob("*.json"):
        if not _is_final(storage.read_json(file)):
            file.unlink()


def asked_of(folder: Path) -> list[dict[str, Any]]:
    """The configurations of an experiment's cases whose results are final."""
    files = [storage.read_json(file) for file in (folder / ENTRIES_NAME).glob("*.json")]
    return [file["asked"] for file in files if _is_final(file)]


def came_to(folder: Path, stem: str) -> list[Entry]:
    """The saved results of a case that has run, including failures."""
    return _entries(storage.read_json(_file(folder, stem)))


def said(axis: str, value: Any) -> str:
    """A value on an axis as part of a point's name: with the axis for numbers, a word without it."""
    return value if isinstance(value, str) and not re.fullmatch(r"[-+.\d]+(e[-+\d]+)?", value) else f"{axis} {value}"


def stem_of(name: str) -> str:
    """A name as a file name: the same where possible, else with a digest that makes it unique."""
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
