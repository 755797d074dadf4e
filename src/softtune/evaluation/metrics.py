"""How well predicted labels and texts agree with the right ones, by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sklearn.metrics import accuracy_score, balanced_accuracy_score


def classification_metrics(right: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """``accuracy`` and ``balanced_accuracy`` (the mean over classes of the share that is found)."""
    with warnings.catch_warnings():
        # A label that is predicted but never right has no share to be found, and is left out of the mean.
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        balanced = balanced_accuracy_score(right, predicted)
    return {"accuracy": float(accuracy_score(right, predicted)), "balanced_accuracy": float(balanced)}


def text_metrics(right: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """``exact_match``: the share of texts that are right to the letter, but for spaces around them."""
    hits = [a.strip() == b.strip() for a, b in zip(right, written, strict=True)]
    return {"exact_match": sum(hits) / len(hits)}
