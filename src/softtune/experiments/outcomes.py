"""Results of experiments: of one run, and of one entry over its seeds.

Knows nothing about models, files or how anything is run.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from softtune.errors import TrainingError, UnsupportedModelError


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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Entry:
        """An entry from its ``dataclasses.asdict`` form."""
        return cls(**{**content, "outcomes": [Outcome(**outcome) for outcome in content["outcomes"]]})

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


def said(axis: str, value: Any) -> str:
    """A value on an axis as part of a point's name: with the axis for numbers, a word without it."""
    return value if isinstance(value, str) and not re.fullmatch(r"[-+.\d]+(e[-+\d]+)?", value) else f"{axis} {value}"
