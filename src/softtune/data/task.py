"""What is asked of a model: what a record reads like, what is right, and what is learnt from it.

Each kind of task has a file of its own: labelling, choosing, tagging, spans, writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from softtune.data.encoding import Example
from softtune.methods import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(Protocol):
    """A task."""

    @property
    def kind(self) -> TaskType:
        """What kind of model answers."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record to answer has."""
        ...

    @property
    def label_column(self) -> str:
        """The column that says what is right."""
        ...

    def right(self, record: Mapping[str, Any]) -> Any:
        """What is right for a labelled record. Raises DataError where it does not say, or the record does not fit."""
        ...

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record as it is trained on."""
        ...
