"""Text generation, such as table-to-text or summarization, with one or several references for each record."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softtune.data.chat import Chat
from softtune.data.encoding import IGNORED, Example, encode, encode_apart
from softtune.data.records import cell_text, each_row
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import Prediction, Task, chat_of, described_chat
from softtune.tasks.metrics import TEXT_METRICS, Quality, text_quality
from softtune.tasks.requests import Generate, Loglikelihood

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Generation(Task):
    """Answers with a generated text."""

    max_new_tokens: int
    """Tokens to generate at most."""

    metrics = TEXT_METRICS

    @property
    def num_new_tokens(self) -> int:
        """See ``Task``."""
        return self.max_new_tokens

    @property
    def writes(self) -> bool:
        """See ``Task``."""
        return True

    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Generate]:
        """See ``Task``."""
        return [Generate(self.prompt(record, tokenizer), self.max_new_tokens)]

    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Any],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """See ``Task``."""
        return Prediction(answer=results[0], truncated=requests[0].example.truncated)

    def measure(
        self, references: Sequence[Sequence[str]], answers: Sequence[str], likelihoods: Tensor | None = None
    ) -> Quality:
        """See ``Task``."""
        return text_quality(references, answers, likelihoods)

    def answer_text(self, record: Mapping[str, Any]) -> str:
        """What a labelled record's text continues with."""
        text: str = self.reference(record)[0]
        return text


@dataclass(frozen=True, kw_only=True)
class TextTask(Generation):
    """Generates a text for each record."""

    kind: TaskType
    """CAUSAL_LM continues the record's text, SEQ_2_SEQ_LM encodes it and writes with its decoder."""
    template: Template
    """Formats a record as text."""
    label_column: str
    """The column with the reference text, or a list of reference texts."""
    max_length: int
    """Tokens of a record at most."""
    max_new_tokens: int
    """Tokens to generate at most."""
    max_answer: int | None = None
    """Tokens of a reference at most, where it is encoded apart from the record; None for no limit."""
    chat: Chat | None = None
    """How the record's text becomes a conversation, whose next turn is the reference; None for a text that the
    reference continues."""

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.labels is None

    @classmethod
    def from_recipe(cls, recipe: Any) -> TextTask:
        """See ``Task``."""
        return cls(
            kind=recipe.task,
            template=Template(recipe.template),
            label_column=recipe.label_column,
            max_length=recipe.max_length,
            max_new_tokens=recipe.max_new_tokens,
            chat=chat_of(recipe),
        )

    @property
    def merges_references(self) -> bool:
        """See ``Task``."""
        return True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return self.template.fields

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """A record's reference texts.

        Raises:
            DataError: there is none, or a field has no text.
        """
        for field in self.template.fields:
            cell_text(record, field)
        value = record[self.label_column]
        texts = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(texts, list) or not texts or not all(str(text or "").strip() for text in texts):
            raise DataError(f"column {self.label_column!r} has no text to write; fill it in or drop the row")
        return [str(text) for text in texts]

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example for each reference."""
        return [self.encode(record, tokenizer, text=text) for text in self.reference(record)]

    def encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, text: str | None = None
    ) -> Example:
        """Encode a record, with a reference text for training, without one for generation."""
        if self.kind is TaskType.CAUSAL_LM:
            return encode(
                self.template,
                record,
                tokenizer,
                answer=text or "",
                max_length=self.max_length,
                add_eos=text is not None,
                chat=self.chat,
            )
        return encode_apart(
            self.template, record, tokenizer, answer=text, max_length=self.max_length, max_answer=self.max_answer
        )

    def prompt(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """See ``Task``."""
        return self.encode(record, tokenizer)

    def reference_request(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Loglikelihood:
        """See ``Task``. Of a reference count about as many tokens as may be generated, and its end where it is among
        them."""
        if self.chat is not None:
            return Loglikelihood([self._with_turn(record, self.reference(record)[0], tokenizer)])
        is_apart = self.kind is TaskType.SEQ_2_SEQ_LM
        wide = self if is_apart else replace(self, max_length=self.max_length + self.max_new_tokens)
        return Loglikelihood([wide._with_reference(record, self.reference(record)[0], tokenizer)])

    def _with_reference(self, record: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        """A record with the first tokens of a reference."""
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        count = self.max_new_tokens
        if len(ends) < count:
            return self.encode(record, tokenizer, text=text)
        example = self.encode(record, tokenizer, text=text[: ends[max(count - 1, 1) - 1][1]])
        labels: Any = example.labels
        is_end = isinstance(labels, list) and labels[-1] == tokenizer.eos_token_id
        return replace(example, labels=[*labels[:-1], IGNORED]) if is_end else example

    def _with_turn(self, record: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        """A record as for generation, with the first tokens of a reference as the assistant's turn."""
        prompt = self.encode(record, tokenizer)
        whole = replace(self, max_length=sys.maxsize).encode(record, tokenizer, text=text)
        turn = [label for label in whole.labels if label != IGNORED][: self.max_new_tokens]
        return replace(prompt, input_ids=prompt.input_ids + turn, labels=prompt.labels + turn)

    def describe(self) -> dict[str, Any]:
        """See ``Task``."""
        return {"template": self.template.text, **described_chat(self.chat)}


def with_all_references(records: Dataset, task: Task) -> Dataset:
    """Merge labelled records with the same input into one with all their references; other columns are the first's."""
    from datasets import Dataset

    references = each_row(records, [*task.columns, task.label_column], task.reference)
    merged = []
    for rows in alike(records, task.columns):
        texts = dict.fromkeys(text for row in rows for text in references[row])
        merged.append({**records[rows[0]], task.label_column: [*texts]})
    return Dataset.from_list(merged)


def alike(records: Dataset, columns: Collection[str]) -> list[list[int]]:
    """Group the indices of rows with the same input in ``columns``, in the order of each group's first row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(tuple(cell_text(record, column) for column in columns), []).append(row)
    return [*rows.values()]
