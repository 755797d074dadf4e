"""Answers are found again in whatever parts a long text is read in."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from softtune.data import Collator
from softtune.errors import DataError
from softtune.tasks.spans import AnswerSpan, SpanTask


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: [CLS] question [SEP] context [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


WORDS = pair_tokenizer()


def task(**changes: Any) -> SpanTask:
    fields = {
        "question": "q",
        "context": "c",
        "label_column": "answers",
        "max_length": 12,
        "stride": 3,
        "may_be_unanswerable": True,
    }
    return SpanTask(**{**fields, **changes})


def record(context: str, *answers: tuple[str, int], question: str = "w1 w2") -> dict[str, Any]:
    return {"q": question, "c": context, "answers": [{"text": t, "answer_start": s} for t, s in answers]}


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_in_every_part_that_has_all_of_it(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"w{draw.randrange(40)}" for _ in range(draw.randint(8, 30))]
    first = draw.randrange(len(words))
    answer = words[first : first + draw.randint(1, 3)]
    context = " ".join(words)
    labelled = record(context, (" ".join(answer), len(" ".join([*words[:first], ""]))))
    parts, examples = task().requests(labelled, WORDS), task().examples(labelled, WORDS)
    found = 0
    for part, example in zip(parts, examples, strict=True):
        assert example.span is not None
        start, end = example.span
        if example.span == (0, 0):
            continue
        found += 1
        assert WORDS.convert_ids_to_tokens(example.input_ids[start : end + 1]) == answer
        assert part.places[0] is None
        assert context[part.places[start][0] : part.places[end][1]] == " ".join(answer)
    assert found or len(answer) > 3
    assert all(len(example.input_ids) <= 12 for example in examples)
    assert examples[0].token_type_ids == [0] * 4 + [1] * (len(examples[0].input_ids) - 4)


def test_half_an_answer_is_none() -> None:
    labelled = record(" ".join(f"w{i}" for i in range(12)), ("w5 w6 w7 w8", 15))
    examples = task(stride=1).examples(labelled, WORDS)
    assert [example.span for example in examples] == [(0, 0), (0, 0)]


def test_a_question_may_have_no_answer_and_squads_two_lists_are_answers() -> None:
    assert [e.span for e in task().examples(record("w3 w4"), WORDS)] == [(0, 0)]
    columns = {**record("w3 w4"), "answers": {"text": ["w4", "w3 w4"], "answer_start": [3, 0]}}
    assert task().reference(columns) == [AnswerSpan("w4", 3), AnswerSpan("w3 w4", 0)]
    assert [e.span for e in task().examples(columns, WORDS)] == [(5, 5)]


def test_a_question_has_to_have_an_answer_unless_the_task_says_otherwise() -> None:
    with pytest.raises(DataError, match="column 'answers' has no answer; set unanswerable: true"):
        task(may_be_unanswerable=False).reference(record("w3 w4"))


def test_padding_moves_spans_along() -> None:
    examples = [
        *task().examples(record("w3 w4", ("w4", 3)), WORDS),
        *task().examples(record("w3 w4 w5", ("w3", 0)), WORDS),
    ]
    right, left = (Collator(0, padding_side=side)(examples) for side in ("right", "left"))
    assert right["start_positions"].tolist() == [5, 4]
    assert left["start_positions"].tolist() == [6, 4]
    assert left["end_positions"].tolist() == [6, 4]
    assert left["token_type_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert "labels" not in left


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("w3 w4", ("w4", 2)), "the answer 'w4' is not at character 2 of 'c'"),
        (record("w3 w4", ("", 0)), "the answer '' is not at character 0"),
        (
            {**record("w3"), "answers": "w3"},
            r"column 'answers' holds no list of answers \(CSV files have none\); write {text, answer_",
        ),
        ({**record("w3"), "answers": [{"text": "w3"}]}, "write 'text' and 'answer_start'"),
        ({**record("w3"), "answers": [{"text": "w3", "answer_start": None}]}, "'answer_start', a number"),
        (
            {**record("w3"), "answers": {"text": "w3", "answer_start": 0}},
            "give 'text' and 'answer_start' lists as long",
        ),
        ({**record("w3"), "answers": {"text": ["w3"], "answer_start": []}}, "lists as long"),
        (record("w3", question="w1 " * 9), "the question takes 12 tokens and the stride 3 of 12"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task().examples(bad, WORDS)
