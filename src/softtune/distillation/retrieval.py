"""BM25: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", with its usual constants
and the idf of Lucene, which is never negative.

Knows nothing about models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.2, 0.75
"""How soon a term's repetition stops to count, and how much a passage's length does."""


def bm25_scores(passages: Sequence[str], query: str) -> list[float]:
    """The score of each passage for a query; 0 where they have no word in common."""
    documents = [Counter(_terms(passage)) for passage in passages]
    lengths = [document.total() for document in documents]
    average = sum(lengths) / max(len(lengths), 1) or 1.0
    frequency = Counter(term for document in documents for term in document)

    def weight(term: str) -> float:
        return math.log(1 + (len(documents) - frequency[term] + 0.5) / (frequency[term] + 0.5))

    def score(document: Counter[str], length: int) -> float:
        norm = K1 * (1 - B + B * length / average)
        return sum(weight(t) * document[t] * (K1 + 1) / (document[t] + norm) for t in set(_terms(query)))

    return [score(document, length) for document, length in zip(documents, lengths, strict=True)]


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
