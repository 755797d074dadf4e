"""Text classification, by the words that a language model writes for a label or by a classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softtune.data.chat import Chat
from softtune.data.encoding import IGNORED, Example, encode, encode_apart, longest, longest_turn
from softtune.data.records import cell_text, text_of
from softtune.data.templates import Template, Verbalizer
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import Prediction, Task, chat_of, described_chat
from softtune.tasks.metrics import LABEL_METRICS, Quality, label_quality
from softtune.tasks.requests import Classify, Loglikelihood, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT_FREE = "N/A"
"""Text of every field of a record without content (Zhao et al. 2021, Calibrate Before Use)."""


class Classification(Task):
    """Answers with the likeliest of some texts."""

    metrics = LABEL_METRICS
    endpoint = "/v1/classify"
    endpoint_summary = "Tell the labels of records, with their probabilities."
    asks_for = "labels"

    def measure(self, references: Sequence[str], answers: Sequence[str], likelihoods: Tensor | None = None) -> Quality:
        """See ``Task``."""
        return label_quality(references, answers)

    def predicted(self, labels: Sequence[str], scores: Tensor, request: Any) -> Prediction:
        """The likeliest of N labels, by their scores [N]."""
        truncated = request.example.truncated
        return Prediction(answer=labels[int(scores.argmax())], labels=labels, scores=scores, truncated=truncated)


@dataclass(frozen=True, kw_only=True)
class LabelTask(Classification):
    """Classifies records into labels."""

    kind: TaskType
    """CAUSAL_LM and SEQ_2_SEQ_LM write the label's words, SEQ_CLS has a classification head."""
    template: Template
    """Formats a record as text."""
    label_column: str
    """The column with the label."""
    verbalizer: Verbalizer
    """The labels and the words for each."""
    max_length: int
    """Tokens of a record at most."""
    max_answer: int | None = None
    """Tokens of a label at most, where it is encoded apart from the record; None for no limit."""
    is_calibrated: bool = False
    """Whether labels' probabilities are divided by those for a record without content."""
    chat: Chat | None = None
    """How the text becomes a conversation, whose next turn is the label; None for a text that the label continues."""

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.labels is not None

    @classmethod
    def from_recipe(cls, recipe: Any) -> LabelTask:
        """See ``Task``."""
        labels = recipe.labels
        return cls(
            kind=recipe.task,
            template=Template(recipe.template),
            label_column=recipe.label_column,
            verbalizer=Verbalizer(labels) if isinstance(labels, dict) else Verbalizer.from_labels(labels),
            max_length=recipe.max_length,
            is_calibrated=recipe.calibrate,
            chat=chat_of(recipe),
        )

    @property
    def has_head(self) -> bool:
        return self.kind is TaskType.SEQ_CLS

    @property
    def writes(self) -> bool:
        """See ``Task``."""
        return not self.has_head

    @property
    def label_set(self) -> tuple[str, ...]:
        """See ``Task``."""
        return tuple(self.verbalizer.labels)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return self.template.fields

    @property
    def baseline_record(self) -> dict[str, str] | None:
        """See ``Task``."""
        return dict.fromkeys(self.columns, CONTENT_FREE) if self.is_calibrated and not self.has_head else None

    def reference(self, record: Mapping[str, Any]) -> str:
        """A record's label.

        Raises:
            DataError: the verbalizer does not have it, or a field has no text.
        """
        for field in self.template.fields:
            cell_text(record, field)
        label = text_of(record, self.label_column)
        self.verbalizer.word(label)
        return label

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example."""
        return [self.encode(record, tokenizer, label=self.reference(record))]

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, label: str | None = None
    ) -> Example:
        """Encode a record, with a label for training or scoring, without one for prediction.

        The record's text is truncated alike for every label, and for none.
        """
        if self.kind is TaskType.CAUSAL_LM:
            return encode(
                self.template,
                record,
                tokenizer,
                answer="" if label is None else self.verbalizer.word(label),
                max_length=self.max_length,
                room=self._room(tokenizer),
                add_eos=self.verbalizer.needs_end and label is not None,
                chat=self.chat,
            )
        target: str | int | None = None
        if label is not None:
            target = self.verbalizer.index(label) if self.has_head else self.verbalizer.word(label)
        return encode_apart(
            self.template, record, tokenizer, answer=target, max_length=self.max_length, max_answer=self.max_answer
        )

    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """See ``Task``."""
        if self.has_head:
            return [Classify(self.encode(record, tokenizer))]
        return [Loglikelihood([self.encode(record, tokenizer, label=label) for label in self.label_set])]

    def prompt(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """See ``Task``."""
        return self.encode(record, tokenizer)

    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Any],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """See ``Task``."""
        [scores] = results
        scores = scores if baseline is None else scores - baseline[0]
        return self.predicted(self.label_set, scores, requests[0])

    def describe(self) -> dict[str, Any]:
        """See ``Task``."""
        return {"template": self.template.text, "labels": self.verbalizer.words, **described_chat(self.chat)}

    def answer_text(self, record: Mapping[str, Any]) -> str:
        """What a labelled record's text continues with."""
        return self.verbalizer.word(self.reference(record))

    def check_tokens(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """See ``Task``."""
        if self.has_head:
            return
        labels: dict[tuple[int, ...], str] = {}
        for label in self.label_set:
            encoded: Any = self.encode(record, tokenizer, label=label).labels
            answer = tuple(token for token in encoded if token != IGNORED)
            if (other := labels.setdefault(answer, label)) != label:
                raise DataError(
                    f"labels {other!r} and {label!r} are the same tokens to the model", "give them other words"
                )

    def _room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Number of tokens of the longest label, with EOS where labels need it, or as the chat template ends them."""
        if self.chat is not None:
            return longest_turn(tuple(self.verbalizer.words.values()), self.chat, tokenizer)
        label_words = tuple(self.template.separator + word for word in self.verbalizer.words.values())
        return _longest(label_words, tokenizer) + self.verbalizer.needs_end


@lru_cache(maxsize=8)
def _longest(label_words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    """See ``longest``; cached, since every record needs it."""
    return longest(label_words, tokenizer)
