"""Predictions of a model with an adapter, and their metrics.

Import from here; the modules are internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.lazy import public_names

if TYPE_CHECKING:
    from softtune.evaluation.answers import Answers, answer, judge
    from softtune.evaluation.ensemble import answer_each, by_mean, by_vote
    from softtune.evaluation.predict import score_head, score_spans, score_tokens, score_words, write_texts
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "Answers": "answers",
            "answer": "answers",
            "answer_each": "ensemble",
            "by_mean": "ensemble",
            "by_vote": "ensemble",
            "judge": "answers",
            "score_head": "predict",
            "score_spans": "predict",
            "score_tokens": "predict",
            "score_words": "predict",
            "write_texts": "predict",
        },
    )

__all__ = [
    "Answers",
    "answer",
    "answer_each",
    "by_mean",
    "by_vote",
    "judge",
    "score_head",
    "score_spans",
    "score_tokens",
    "score_words",
    "write_texts",
]
