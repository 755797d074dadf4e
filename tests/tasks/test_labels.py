"""Tasks: how records become examples for each kind of model, and which row a message names."""

import datasets
import pytest

from softtune.data import Template, Verbalizer
from softtune.data.records import each_row
from softtune.errors import DataError
from softtune.methods import TaskType
from softtune.tasks import LabelTask, TextTask
from tests.data.test_templates import WORDS, answer_of, words_of

RECORDS = datasets.Dataset.from_dict({"x": ["x0 x1 x2", "x0", ""], "label": [1, 0, 1]})
YES_NO = Verbalizer({"0": "y0", "1": "OK"})


def task(**changes):
    fields = {
        "kind": TaskType.CAUSAL_LM,
        "template": Template("A1 {x} Q "),
        "label_column": "label",
        "verbalizer": YES_NO,
        "max_length": 9,
    }
    return LabelTask(**{**fields, **changes})


def writing(**changes):
    fields = {"kind": TaskType.CAUSAL_LM, "template": Template("A1 {x} Q "), "label_column": "x"}
    return TextTask(**{**fields, "max_length": 9, "max_new_tokens": 3, **changes})


def encoded(asked, records=RECORDS, *, label=True):
    def encode(record):
        return asked.examples(record, WORDS)[0] if label else asked.encode(record, WORDS)

    return each_row(records, [*asked.columns, asked.label_column], encode)


def test_a_language_model_reads_the_answer_in_the_verbalizers_words():
    examples = encoded(task(max_length=4))
    assert [" ".join(words_of(e)) for e in examples] == ["A1 x0 Q OK", "A1 x0 Q y0", "A1 Q OK"]
    assert [e.truncated for e in examples] == [2, 0, 0]


def test_every_label_follows_the_same_words():
    asked = task(verbalizer=Verbalizer({"0": "y0", "1": "OK OK OK"}), max_length=6)
    examples = [asked.encode(RECORDS[0], WORDS, label=label) for label in ("0", "1", None)]
    assert [" ".join(words_of(e)) for e in examples] == ["A1 x0 Q y0", "A1 x0 Q OK OK OK", "A1 x0 Q"]
    assert [e.truncated for e in examples] == [2, 2, 2]


def test_an_answer_longer_than_the_model_writes_names_its_row():
    asked = writing(kind=TaskType.SEQ_2_SEQ_LM, max_answer=2)
    with pytest.raises(DataError, match=r"^row 1: the answer has 3 tokens, the model writes 2 at most"):
        encoded(asked, RECORDS.select([0, 1]))


def test_free_text_ends_with_the_end_of_sequence():
    (example,) = encoded(writing(), RECORDS.select([1]))
    assert words_of(example) == ["A1", "x0", "Q", "x0", "</s>"]


def test_without_a_label_the_prompt_is_open():
    examples = encoded(task(), label=False)
    assert [answer_of(e) for e in examples] == [[], [], []]
    assert [words_of(e)[-1] for e in examples] == ["Q", "Q", "Q"]


def test_a_head_gets_class_ids_and_an_encoder_decoder_the_answer_apart():
    assert [e.labels for e in encoded(task(kind=TaskType.SEQ_CLS))] == [[1], [0], [1]]
    apart = encoded(task(kind=TaskType.SEQ_2_SEQ_LM))
    assert [WORDS.convert_ids_to_tokens(e.labels) for e in apart] == [["OK"], ["y0"], ["OK"]]
    assert words_of(apart[1]) == ["A1", "x0", "Q"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "labels"}, r"^no column 'labels' in the data, which has 'x', 'label'; did you mean 'label'"),
        ({"template": Template("{y}")}, r"^no column 'y'"),
        ({"verbalizer": Verbalizer({"1": "yes"})}, r"^row 2: label '0' is not one of '1'"),
        ({"label_column": "x"}, r"^row 1: label 'x0 x1 x2' is not one of '0', '1'"),
        ({"max_length": 1}, r"^row 1: template and answer alone take 3 tokens, max_length is 1"),
    ],
)
def test_what_does_not_fit_names_its_row(changes, message):
    with pytest.raises(DataError, match=message):
        encoded(task(**changes))
