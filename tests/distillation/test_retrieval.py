"""BM25 against its formula, written out for each passage and word."""

from __future__ import annotations

import math

import pytest

from softtune.distillation.retrieval import bm25_scores

PASSAGES = ["The red sky, the red sea.", "A cold sea", "blue", "", "sea sea sea sea sea sea sea sea and more of it"]


def slowly(passages: list[str], query: set[str]) -> list[float]:
    words = [[w.strip(".,").lower() for w in p.split()] for p in passages]
    average = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        score = 0.0
        for term in query:
            n = sum(term in other for other in words)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            f = own.count(term)
            score += idf * f * 2.2 / (f + 1.2 * (1 - 0.75 + 0.75 * len(own) / average))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["Red sea?", "cold", "nothing", ""])
def test_scores_are_the_formulas(query: str) -> None:
    terms = {word.strip("?").lower() for word in query.split()}
    assert bm25_scores(PASSAGES, query) == pytest.approx(slowly(PASSAGES, terms))


def test_rare_words_and_short_passages_count_more() -> None:
    red_sea, cold_sea, blue, empty, long = bm25_scores(PASSAGES, "the cold sea")
    assert cold_sea > red_sea > long > blue == empty == 0


def test_no_passages() -> None:
    assert bm25_scores([], "sea") == []
    assert bm25_scores([""], "sea") == [0]
