"""Tags belong to words, whatever tokens the words have."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from softtune.data.encoding import IGNORED
from softtune.errors import DataError
from softtune.tasks.tags import TagTask, check_bio
from tests.data.test_templates import WORDS

LABELS = ("O", "B-PER", "I-PER", "B-LOC")


def task(**changes: Any) -> TagTask:
    return TagTask(**{"words": "tokens", "label_column": "tags", "labels": LABELS, "max_length": 9, **changes})


def record(words: list[str], tags: list[str]) -> dict[str, Any]:
    return {"tokens": words, "tags": tags}


SENTENCE = record(["x0 x1", "OK", "y0"], ["B-PER", "I-PER", "O"])


def test_a_words_first_token_has_its_tag() -> None:
    (example,) = task().examples(SENTENCE, WORDS)
    assert WORDS.convert_ids_to_tokens(example.input_ids) == ["x0", "x1", "OK", "y0"]
    assert example.labels == [1, IGNORED, 2, 0]


def test_words_that_are_cut_have_no_place() -> None:
    [request] = task(max_length=3).requests(SENTENCE, WORDS)
    example, firsts = request.example, request.firsts
    assert firsts == [0, 2, None]
    assert example.truncated == 1
    assert task(max_length=3).examples(SENTENCE, WORDS)[0].labels == [1, IGNORED, 2]


def test_an_empty_word_has_no_place() -> None:
    [request] = task().requests(record(["x0", "", "OK"], ["O", "O", "O"]), WORDS)
    assert request.firsts == [0, None, 1]


def test_words_read_as_a_running_text() -> None:
    """With the spaces that byte-level tokenizers have within their tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({token: i for i, token in enumerate([*letters, "Ġb"])}, [("Ġ", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = PreTrainedTokenizerFast(tokenizer_object=core)
    [request] = task().requests(record(["a", "bc", "d", "b"], ["O"] * 4), own)
    example, firsts = request.example, request.firsts
    assert own.convert_ids_to_tokens(example.input_ids) == ["a", "Ġb", "c", "Ġ", "d", "Ġb"]
    assert firsts == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(["x0"], ["O", "O"]), "1 words and 2 tags; give one tag for each word"),
        (record(["x0"], ["B-ORG"]), "tag 'B-ORG' is not one of O, B-PER, I-PER, B-LOC"),
        (record(["x0", "x1"], ["O", "I-PER"]), "tag 'I-PER' at word 2 follows 'O'; begin an entity with B-PER"),
        (record(["x0"], ["I-PER"]), "tag 'I-PER' is the first word's; begin an entity with B-PER"),
        (record(["x0", "x1"], ["B-LOC", "I-PER"]), "tag 'I-PER' at word 2 follows 'B-LOC'"),
        (record([], []), "column 'tokens' has no words"),
        (record(["", ""], ["O", "O"]), "the words have no tokens"),
        ({"tokens": "x0 x1", "tags": ["O"]}, "column 'tokens' holds no list of texts"),
        ({"tokens": ["x0"], "tags": None}, "column 'tags' holds no list of texts"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task().examples(bad, WORDS)


def test_entities_may_stand_side_by_side() -> None:
    check_bio(["B-PER", "I-PER", "B-PER", "I-PER", "I-PER", "O", "B-LOC"])
