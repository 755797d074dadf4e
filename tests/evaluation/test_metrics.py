"""Metrics equal those of the libraries they come from, on all rows and on some, and intervals shrink with rows."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from softtune.tasks.metrics import Quality, contains, label_quality, span_quality, tag_quality, text_quality

LABELS = ["a", "b", "c"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "another", "small", "cat"]


@pytest.mark.parametrize(
    ("reference", "answer", "is_there"),
    [
        ("145 crowns", "It costs 145 crowns.", True),
        ("The pilot boat", "in a pilot boat", True),
        ("pilot boat", "the pilot, the boat", True),
        ("pilot boat", "the boat's pilot", False),
        ("pilot boat", "pilot boats", False),
        ("145", "1450", False),
        ("red sky", "red", False),
        ("red sky", "", False),
        ("A", "The answer is A.", True),
        ("A", "B", False),
        ("A", "ANY", False),
        ("A", "it is a dog", False),
        ("%", "50%", True),
        ("%", "50", False),
        ("...", "?", False),
        ("", "", True),
        ("", "red", False),
    ],
)
def test_answers_that_contain_a_reference(reference: str, answer: str, is_there: bool) -> None:
    assert contains(reference, answer) is is_there


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_labels(seed: int) -> None:
    draw = random.Random(seed)
    right = draw.choices(LABELS[:2] if seed == 2 else LABELS, k=60)
    answers = [label if draw.random() < 0.6 else draw.choice(LABELS) for label in right]
    quality = label_quality(right, answers)
    assert quality.metrics == pytest.approx(
        {
            "accuracy": accuracy_score(right, answers),
            "balanced_accuracy": balanced_accuracy_score(right, answers),
            "macro_f1": f1_score(right, answers, average="macro"),
        }
    )
    assert quality.mistakes == [i for i, (a, b) in enumerate(zip(right, answers, strict=True)) if a != b]
    assert {label: own["rows"] for label, own in quality.classes.items() if own["rows"]} == {
        label: right.count(label) for label in {*right}
    }
    some = np.arange(7, 41)
    parts = [[side[i] for i in some] for side in (right, answers)]
    assert quality.statistics["macro_f1"](some) == pytest.approx(f1_score(*parts, average="macro"))


def test_entities_count_whole() -> None:
    draw = random.Random(5)
    right = [["O", "B-PER", "I-PER", "O", "B-LOC"][: draw.randint(1, 5)] for _ in range(40)]
    answers = [[tag if draw.random() < 0.8 else draw.choice(TAGS) for tag in tags] for tags in right]
    quality = tag_quality(right, answers)
    flat = [[tag for tags in side for tag in tags] for side in (right, answers)]
    assert quality.metrics == pytest.approx(
        {
            "f1": entity_f1(right, answers),
            "precision": precision_score(right, answers),
            "recall": recall_score(right, answers),
            "accuracy": accuracy_score(*flat),
        }
    )
    assert sorted(quality.classes) == ["LOC", "PER"]
    half = np.arange(20)
    assert quality.statistics["f1"](half) == pytest.approx(entity_f1(right[:20], answers[:20]))


def test_nothing_found_is_no_error() -> None:
    quality = tag_quality([["O", "B-PER"]], [["O", "O"]])
    assert quality.metrics == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.5}


def test_spans_take_the_nearest_answer() -> None:
    right = [["The Normans", "Normans of France"], ["10th century"], [], []]
    quality = span_quality(right, ["normans!", "the 10th and 11th century", "", "France"])
    assert quality.metrics == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 / 3 + 1 + 0) / 4})
    assert quality.mistakes == [1, 3]


@pytest.mark.parametrize(
    ("right", "answer", "exact", "f1"),
    [
        ("The cat sat.", "a cat sat down", 0.0, 4 / 5),
        ("an  Apple-pie", "applepie", 1.0, 1.0),  # punctuation goes without leaving a space
        ("theatre", "the atre", 0.0, 0.0),  # articles are whole words
        ("to be or not to be", "to be", 0.0, 4 / 8),  # a word counts as often as it stands in both
        ("a", "", 1.0, 1.0),  # nothing is left of an article
        ("", "Paris", 0.0, 0.0),
    ],
)
def test_spans_are_compared_by_the_words_of_squad(right: str, answer: str, exact: float, f1: float) -> None:
    assert span_quality([[right]], [answer]).metrics == pytest.approx({"exact_match": exact, "f1": f1})


def test_texts_are_compared_with_every_reference() -> None:
    draw = random.Random(7)
    counts = [draw.randint(1, 3) for _ in range(30)]
    right = [[" ".join(draw.choices(WORDS, k=draw.randint(5, 9))) for _ in range(count)] for count in counts]
    answers = [draw.choice(several)[: draw.randint(9, 40)] for several in right]
    quality = text_quality(right, answers)
    streams = [[several[i] if i < len(several) else None for several in right] for i in range(3)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score_multi(a, b)["rougeL"].fmeasure for a, b in zip(right, answers, strict=True)]
    assert quality.metrics["bleu"] == pytest.approx(BLEU().corpus_score(answers, streams).score / 100)
    assert quality.metrics["chrf"] == pytest.approx(CHRF().corpus_score(answers, streams).score / 100)
    assert quality.metrics["rouge_l"] == pytest.approx(sum(rouge) / len(rouge))
    ten = BLEU().corpus_score(answers[:10], [stream[:10] for stream in streams]).score / 100
    assert quality.statistics["bleu"](np.arange(10)) == pytest.approx(ten)


def test_intervals_hold_the_metric_and_shrink_with_rows() -> None:
    def of_rows(rows: int) -> Quality:
        return label_quality(["a", "b"] * rows, ["a", "a", "b", "b"] * (rows // 2))

    widths = []
    for rows in (20, 320):
        quality = of_rows(rows)
        low, high = quality.intervals()["accuracy"]
        assert low < quality.metrics["accuracy"] < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.2)
    assert of_rows(20).intervals() == of_rows(20).intervals()
