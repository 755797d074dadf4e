"""Token classification: a tag for every word of a sentence, such as BIO tags of named entities.

A word's tag is trained and predicted at the first token of the word. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softtune.data.encoding import IGNORED, Example
from softtune.data.templates import Template
from softtune.errors import DataError
from softtune.peft_types import TaskType
from softtune.tasks.base import Prediction, Task
from softtune.tasks.metrics import TAG_METRICS, Quality, tag_quality
from softtune.tasks.requests import ClassifyTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTSIDE = "O"
"""The BIO tag of a word outside of all entities."""


@dataclass(frozen=True, eq=False)
class WordTags(ClassifyTokens):
    """Tags of a sentence's words."""

    firsts: Sequence[int | None]
    """The index of each word's first token; None for words that were cut, or have no token."""


@dataclass(frozen=True, kw_only=True)
class TagTask(Task):
    """Tags the words of sentences."""

    words: str
    """The column with a sentence's words, a list."""
    label_column: str
    """The column with their tags, a list."""
    labels: tuple[str, ...]
    """The tags, in order of their class ids."""
    max_length: int
    """Tokens of a sentence at most."""

    kind = TaskType.TOKEN_CLS
    metrics = TAG_METRICS
    endpoint = "/v1/tag"
    endpoint_summary = "Tell the tags of records' words."
    asks_for = "tags"
    bare_template = "{tokens}"

    @classmethod
    def fits(cls, recipe: Any) -> bool:
        """See ``Task``."""
        return recipe.task is TaskType.TOKEN_CLS

    @classmethod
    def check_recipe(cls, recipe: Any) -> None:
        """See ``Task``."""
        if isinstance(recipe.labels, dict):
            raise ValueError("TOKEN_CLS has no words for its labels: list the tags")
        if others := [tag for tag in recipe.labels or () if not is_bio(tag)]:
            what = f"the label {others[0]!r} is no BIO tag"
            raise ValueError(f"{what}: write O, and B- and I- before the kind of an entity")

    @classmethod
    def from_recipe(cls, recipe: Any) -> TagTask:
        """See ``Task``."""
        [words] = Template(recipe.template).fields
        labels = tuple(recipe.labels or ())
        return cls(words=words, label_column=recipe.label_column, labels=labels, max_length=recipe.max_length)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prediction needs."""
        return (self.words,)

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """A record's tags.

        Raises:
            DataError: there is not one known tag for each word, or the tags are not valid BIO.
        """
        words, tags = self._words(record), _list(record, self.label_column)
        if len(words) != len(tags):
            raise DataError(f"{len(words)} words and {len(tags)} tags; give one tag for each word")
        for tag in tags:
            if tag not in self.labels:
                raise DataError(f"tag {tag!r} is not one of {', '.join(self.labels)}; add it to labels or fix the data")
        check_bio(tags)
        return tags

    def examples(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Encode a labelled record for training: one example."""
        classes = [self.labels.index(tag) for tag in self.reference(record)]
        input_ids, firsts, cut = self._encode(record, tokenizer)
        labels = [IGNORED] * len(input_ids)
        for word, first in enumerate(firsts):
            if first is not None:
                labels[first] = classes[word]
        return [Example(input_ids=input_ids, labels=labels, truncated=cut)]

    def requests(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[WordTags]:
        """See ``Task``."""
        ids, firsts, truncated = self._encode(record, tokenizer)
        return [WordTags(Example(input_ids=ids, labels=[IGNORED] * len(ids), truncated=truncated), firsts)]

    def process(
        self,
        record: Mapping[str, Any],
        requests: Sequence[Any],
        results: Sequence[Any],
        baseline: Sequence[Any] | None = None,
    ) -> Prediction:
        """See ``Task``."""
        [request], [logits] = requests, results
        classes = logits.argmax(-1).tolist()
        tags = tuple(OUTSIDE if first is None else self.labels[classes[first]] for first in request.firsts)
        return Prediction(answer=tags, truncated=request.example.truncated)

    def measure(
        self, references: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], likelihoods: Tensor | None = None
    ) -> Quality:
        """See ``Task``."""
        return tag_quality(references, answers)

    def as_json(self, prediction: Prediction) -> dict[str, Any]:
        """See ``Task``."""
        return {"tags": list(prediction.answer), "truncated": prediction.truncated}

    def _words(self, record: Mapping[str, Any]) -> list[str]:
        words = _list(record, self.words)
        if not words:
            raise DataError(f"column {self.words!r} has no words; drop the row")
        return words

    def _encode(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], list[int | None], int]:
        """Token ids, the index of each word's first token, and how many tokens were truncated.

        The words are tokenized as one text, joined by spaces.

        Raises:
            DataError: there are no words, or they have no tokens.
        """
        words = self._words(record)
        text = " ".join(words)
        whole = tokenizer(text, verbose=False)
        short = tokenizer(text, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        spaced = [[number] * len(word) + [None] for number, word in enumerate(words)]
        owner_of = [owner for word_owners in spaced for owner in word_owners]  # of each character
        covered = [owner_of[start:end] for start, end in short["offset_mapping"]]
        owners = [next((owner for owner in chars if owner is not None), None) for chars in covered]
        firsts = [owners.index(word) if word in owners else None for word in range(len(words))]
        if not any(first is not None for first in firsts):
            raise DataError("the words have no tokens; drop the row")
        return list(short["input_ids"]), firsts, len(whole["input_ids"]) - len(short["input_ids"])


def is_bio(tag: str) -> bool:
    """Whether a tag is a BIO tag: O, or B- or I- and the kind of an entity."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def check_bio(tags: Sequence[str]) -> None:
    """Check that tags are valid BIO.

    Raises:
        DataError: a tag I-X does not follow B-X or I-X.
    """
    for i, (before, tag) in enumerate(zip([OUTSIDE, *tags], tags, strict=False), start=1):
        if tag.startswith("I-") and before[1:] != tag[1:]:
            place = f"at word {i} follows {before!r}" if i > 1 else "is the first word's"
            raise DataError(f"tag {tag!r} {place}; begin an entity with B{tag[1:]}")


def _list(record: Mapping[str, Any], column: str) -> list[str]:
    value = record[column]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"column {column!r} holds no list of texts (CSV files have none); give one for each word")
    return value
