"""What training and evaluation report of their progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the work whose steps or rows are counted."""

    activity: str
    """What is done."""
    _: KW_ONLY
    run: str | None = None
    """Name of the run's output, where several recipes run at once."""
    member: str | None = None
    """Name of the ensemble's member that is trained."""

    def __str__(self) -> str:
        """The phase in words, such as "sst2: training 1" for an ensemble's first member in the run sst2."""
        run = "" if self.run is None else f"{self.run}: "
        member = "" if self.member is None else f" {self.member}"
        return f"{run}{self.activity}{member}"


TRAINING = Phase("training")
EVALUATING = Phase("evaluating")
EVALUATING_BASE_MODEL = Phase("evaluating the base model")
IN_CONTEXT = Phase("evaluating in context")
"""The base model with the examples that a prompt starts from, before it is trained."""

Progress = Callable[[Phase, int, int, str], None]
"""Progress callback: takes the phase, steps or rows done, their total, and the latest loss and speed as text."""
