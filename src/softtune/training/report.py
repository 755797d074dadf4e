"""Results of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from softtune.tasks.metrics import LOSS, Quality
from softtune.training.folder import HISTORY_NAME, LOGS

METRICS_NAME = "metrics.json"
"""File with the metrics of a finished run."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality of an adapter, or of an ensemble, on the evaluation rows; empty without such rows."""

    quality: Quality | None = None
    """Of an ensemble: that of its members' mean probability, or of their vote where records share no labels."""
    members: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each adapter of an ensemble; empty for a single adapter."""
    vote: dict[str, float] = field(default_factory=dict)
    """Metrics of the majority vote of an ensemble's members; empty for a single adapter."""
    truncated: int = 0
    """Number of evaluation rows that were truncated."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a training run."""

    finished: bool
    """False after an interrupt: ``resume`` continues from the checkpoint."""
    steps: int
    before: dict[str, float]
    """Metrics on the evaluation rows of the base model alone, or with the examples that a prompt starts from; empty
    without such rows."""
    evaluation: Evaluation
    """Quality with the trained adapter or ensemble; empty after an interrupt."""
    trained: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters, the base model's included."""
    training_rows: int
    validation_rows: int
    """Number of training rows held out to choose the best checkpoint by."""
    best_steps: list[int]
    """For each adapter the step with the best ``best_by`` on these rows, whose weights are kept; empty without them."""
    best_by: str = LOSS
    """The recipe's ``metric_for_best_model``."""
    evaluation_rows: int
    truncated: int
    """Number of training rows that were truncated."""
    folder: Path
    seconds: float
    """Duration of the training alone, of all recipes that ran at once. After a resume, the time since then."""
    leave_one_out: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))
    """Metrics before and after on the training rows, each without the virtual tokens that start from it; empty where
    there are evaluation rows, or where the prefix does not start from examples."""
    repository: str | None = None
    """Name of the repository on the hub that the folder was uploaded to."""

    @property
    def after(self) -> dict[str, float]:
        """Metrics with the trained adapter or ensemble."""
        return self.evaluation.quality.metrics if self.evaluation.quality else {}

    @property
    def size(self) -> int:
        """Bytes of the adapter's folder, without the history, metrics and logs of its training."""
        of_training = (HISTORY_NAME, METRICS_NAME)
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in of_training]
        return sum(path.stat().st_size for path in files if LOGS not in path.relative_to(self.folder).parts)
