"""The protocol of a task: which columns it reads, a record's reference, and its encoding for training.

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
    """Defines how records are encoded and labelled."""

    @property
    def kind(self) -> TaskType:
        """The type of model for the task."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        ...

    @property
    def label_column(self) -> str:
        """The column with the reference."""
        ...

    def reference(self, record: Mapping[str, Any]) -> Any:
        """The reference of a labelled record, such as its label.

        Raises:
            DataError: it is missing or invalid, or the record does not fit the task.
        """
        ...

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training, as one or several examples."""
        ...
