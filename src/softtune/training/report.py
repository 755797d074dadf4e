"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from softtune.evaluation.metrics import Quality
from softtune.training.folder import HISTORY_NAME, LOGS


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an adapter, or an ensemble of them, answers to the rows held out; empty without such rows."""

    quality: Quality | None = None
    """An ensemble's is that of its members' mean probability, or of their vote where records share no labels."""
    members: list[dict[str, float]] = field(default_factory=list)
    """Those of each adapter of an ensemble; empty where there is only one."""
    vote: dict[str, float] = field(default_factory=dict)
    """Those of the majority of an ensemble's members; empty where there is only one."""
    truncated: int = 0
    """Rows that were cut to fit."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to."""

    finished: bool
    """False after an interrupt: the checkpoint waits for ``resume``."""
    steps: int
    before: dict[str, float]
    """Metrics of the base model alone on the evaluation rows; empty without such rows."""
    evaluation: Evaluation
    """The same with what was trained; empty after an interrupt."""
    trained: int
    """Numbers that are trained."""
    total: int
    """All numbers, the base model's included."""
    training_rows: int
    validation_rows: int
    """Held out of the training rows, to tell when to stop."""
    best_steps: list[int]
    """The step at which their loss was lowest, whose numbers are kept, of each adapter; empty where nothing told."""
    evaluation_rows: int
    truncated: int
    """Training rows that were cut to fit."""
    folder: Path
    seconds: float
    """Of training alone, with all that ran at once; since it went on, where it was resumed."""

    @property
    def after(self) -> dict[str, float]:
        """Metrics with what was trained."""
        return self.evaluation.quality.metrics if self.evaluation.quality else {}

    @property
    def size(self) -> int:
        """Bytes of the adapter's folder, but for the history and logs of its training."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != HISTORY_NAME]
        return sum(path.stat().st_size for path in files if LOGS not in path.relative_to(self.folder).parts)
