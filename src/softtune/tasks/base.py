"""A task: how a record becomes requests to a model, and their results an answer. Knows no model.

Each kind of task is one file, and one line in ``softtune.tasks.KINDS``. The cut is lm-evaluation-harness' (Gao et al.,
2021): requests are constructed, executed by whoever has the model, and processed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from softtune.data.chat import Chat
from softtune.data.encoding import Example
from softtune.peft_types import TaskType
from softtune.tasks.metrics import Quality
from softtune.tasks.requests import Loglikelihood, Request

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answers to a record."""

    answer: Any
    """The label, the choice, a tuple of the words' tags, the part of a text, or the text."""
    labels: Sequence[str] = ()
    """N labels or choices that the answer is one of; empty where there are none."""
    scores: Tensor | None = None
    """[N] their log-probabilities, up to a constant."""
    truncated: int = 0
    """Tokens of the record that did not fit."""
    span: tuple[int, int] | None = None
    """The first character of a part of a text, and the one behind its last."""


class Task(ABC):
    """A task. Its fields are those of the kind."""

    metrics: ClassVar[tuple[str, ...]]
    """What the answers are measured by, the foremost first; see ``tasks.metrics.METRICS``."""
    needs_metrics: ClassVar[bool] = True
    """Whether measuring its answers takes packages of the extra ``metrics``."""
    endpoint: ClassVar[str | None] = None
    """Where a server takes records for it; None where it takes texts, at its completions."""
    endpoint_summary: ClassVar[str] = ""
    """What the server's documentation says of the endpoint."""
    bare_template: ClassVar[str | None] = None
    """A template of the kind that has columns and nothing else; None where any template fits."""
    has_template: ClassVar[bool] = True
    """Whether a template formats its records, and a column of its own has the reference."""
    asks_for: ClassVar[str] = "texts"
    """What the endpoint answers with, in a word."""
    kind: TaskType
    """The task type of the model that answers."""
    label_column: str
    """The column with the reference."""
    max_length: int
    """Tokens of a record at most."""

    @classmethod
    @abstractmethod
    def fits(cls, recipe: Any) -> bool:
        """Whether a recipe describes a task of this kind."""

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: Any) -> Task:
        """The task that a recipe of this kind describes."""

    @classmethod  # noqa: B027  # most kinds have nothing to check
    def check_recipe(cls, recipe: Any) -> None:
        """Check that a recipe's fields fit this kind.

        Raises:
            ValueError: one does not.
        """

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""

    def has_references(self, records: Dataset) -> bool:
        """Whether records have references, which their answers can be measured by."""
        return self.label_column in records.column_names

    @property
    def num_new_tokens(self) -> int:
        """Tokens to generate at most, behind a record."""
        return 0

    @property
    def label_set(self) -> tuple[str, ...]:
        """The labels of whole records; empty for other kinds."""
        return ()

    @property
    def writes(self) -> bool:
        """Whether the answer is generated, or could be: a text, or a label's words."""
        return False

    @property
    def merges_references(self) -> bool:
        """Whether records that read alike are one record with several references."""
        return False

    @property
    def baseline_record(self) -> Mapping[str, Any] | None:
        """A record without content whose results every prediction is calibrated by; None without calibration."""
        return None

    @abstractmethod
    def reference(self, record: Mapping[str, Any]) -> Any:
        """The reference answer of a labelled record.

        Raises:
            DataError: the label is missing or unknown, or the record does not fit.
        """

    @abstractmethod
    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """A labelled record, encoded for training."""

    @abstractmethod
    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sequence[Request]:
        """What to request of the model for a record.

        Raises:
            DataError: the record does not fit.
        """

    @abstractmethod
    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Request],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """The prediction for a record.

        Args:
            record: the record.
            requests: those of ``requests``.
            results: the result of each, as its class says.
            baseline: the results of the baseline record, where there is one.
        """

    @abstractmethod
    def measure(self, references: Sequence[Any], answers: Sequence[Any], likelihoods: Tensor | None = None) -> Quality:
        """The metrics of answers.

        Args:
            references: of every record.
            answers: the predictions' ``answer`` of every record.
            likelihoods: [B, 2] see ``reference_request``; None where there are none.
        """

    def prompt(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """A record's text to continue, of kinds that write."""
        raise NotImplementedError

    def reference_request(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Loglikelihood | None:
        """The log-likelihood of a record's first reference; None where the kind has no use for it."""
        return None

    def answer_text(self, record: Mapping[str, Any]) -> str:
        """What a labelled record's text continues with, of kinds whose answer is text."""
        raise NotImplementedError

    def num_choices(self, record: Mapping[str, Any]) -> int:
        """How many choices a record brings, whose number a server limits."""
        return 0

    def as_json(self, prediction: Prediction) -> dict[str, Any]:
        """A prediction as the endpoint returns it: the label with each one's probability, or the answer."""
        if prediction.scores is None:
            return {"answer": prediction.answer}
        scores = dict(zip(prediction.labels, prediction.scores.softmax(-1).tolist(), strict=True))
        return {"label": max(scores, key=scores.__getitem__), "scores": scores, "truncated": prediction.truncated}

    def describe(self) -> dict[str, Any]:
        """What a server tells its clients of the task, beside the columns."""
        return {}

    def check_tokens(  # noqa: B027  # most kinds have nothing to check
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Check what only tokens show, on one record.

        Raises:
            DataError: two answers are the same tokens.
        """


def chat_of(recipe: Any) -> Chat | None:
    """How a recipe puts a template's text into a conversation; None if it does not."""
    return Chat(recipe.system) if recipe.chat else None


def described_chat(chat: Chat | None) -> dict[str, Any]:
    """What a server tells its clients of it."""
    return {} if chat is None else {"chat": True, "system": chat.system}
