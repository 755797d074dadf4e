"""Texts with several references, choices, and lists in fields."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from softtune.data import Template
from softtune.data.records import cell_text
from softtune.errors import DataError
from softtune.methods import TaskType
from softtune.tasks.choices import ChoiceTask
from softtune.tasks.texts import TextTask, with_all_references
from tests.data.test_templates import WORDS, words_of


def writing(**changes: Any) -> TextTask:
    fields = {"kind": TaskType.CAUSAL_LM, "label_column": "refs", "max_length": 9, "max_new_tokens": 3}
    return TextTask(**{**fields, "template": Template("{x} Q "), **changes})


def choosing(**changes: Any) -> ChoiceTask:
    fields = {"template": Template("{x} Q "), "choices": "options", "label_column": "label", "max_length": 7}
    return ChoiceTask(**{**fields, **changes})


def test_every_reference_is_an_example() -> None:
    examples = writing().examples({"x": "x0", "refs": ["OK", "y0 OK"]}, WORDS)
    assert [" ".join(words_of(e)) for e in examples] == ["x0 Q OK </s>", "x0 Q y0 OK </s>"]
    assert writing().reference({"x": "x0", "refs": "OK"}) == ["OK"]


def test_records_that_read_alike_are_one_with_all_references() -> None:
    records = Dataset.from_dict({"x": ["a", "b", "a"], "refs": ["1", "2", "3"], "id": [7, 8, 9]})
    assert with_all_references(records, writing()).to_list() == [
        {"x": "a", "refs": ["1", "3"], "id": 7},
        {"x": "b", "refs": ["2"], "id": 8},
    ]


@pytest.mark.parametrize("value", [None, [], ["OK", ""], "", {"text": "OK"}])
def test_references_that_are_missing_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="column 'refs' has no text to write"):
        writing().examples({"x": "x0", "refs": value}, WORDS)


def test_every_choice_follows_the_same_words() -> None:
    record = {"x": "x0 x1 x2", "options": ["y0", "OK y0 OK"], "label": 1}
    encoded = [choosing().encode(record, WORDS, choice) for choice in record["options"]]
    assert [" ".join(words_of(e)) for e in encoded] == ["x0 x1 Q y0 </s>", "x0 x1 Q OK y0 OK </s>"]
    assert choosing().reference(record) == "OK y0 OK"
    assert choosing().reference({**record, "label": "y0"}) == "y0"
    digits = {**record, "options": ["4", "2", "3", "0"]}
    assert [choosing().reference({**digits, "label": label}) for label in (2, "2", "1")] == ["3", "2", "2"]
    assert choosing().examples(record, WORDS) == [encoded[1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 2}, "2 is not one of 'y0', 'OK', nor the number of one from 0"),
        ({"label": None}, "None is not one of"),
        ({"options": ["y0"]}, "column 'options' holds no list of two texts or more"),
        ({"options": "y0"}, "column 'options' holds no list of two texts or more"),
        ({"options": ["y0", "y0"]}, "the same choice twice"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choosing().examples({"x": "x0", "options": ["y0", "OK"], "label": 0, **changes}, WORDS)


def test_lists_in_a_field_are_read_out() -> None:
    record = {"sentences": ["One.", "Two."], "triples": [["a", "b", 1], ["c", "d", "e"]], "none": []}
    assert [cell_text(record, name) for name in record] == ["One. Two.", "a | b | 1 && c | d | e", ""]
