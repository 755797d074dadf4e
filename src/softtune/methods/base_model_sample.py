"""The sample of word embeddings in an adapter's folder, by which its base model is recognized.

Knows nothing about files: notes are the content of softtune's config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softtune.backbone import Backbone

SAMPLE_KEY = "embedding_sample"
ROWS_KEY = "embedding_rows"
"""Number of rows of the sampled embedding; rows that were added or removed since are not compared."""
SAMPLE_TOLERANCE = 0.05
"""Difference of two embedding samples (precision, quantisation), relative to the largest value, up to which they count
as the same base model's."""


def sample_notes(backbone: Backbone) -> dict[str, Any]:
    """The sample of a base model, under the keys of softtune's config."""
    return {SAMPLE_KEY: backbone.embedding_sample(), ROWS_KEY: backbone.embedding.num_embeddings}


def may_be_base(notes: Mapping[str, Any], backbone: Backbone) -> bool:
    """Whether an adapter with these notes can be this base model's; true where they hold no sample."""
    saved = notes.get(SAMPLE_KEY)
    return saved is None or _is_same(saved, backbone.embedding_sample(notes.get(ROWS_KEY)))


def may_share_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two adapters with these notes can be for one base model; true where one of them holds no sample.

    Samples of embeddings with different numbers of rows are of different words, and count as different.
    """
    if SAMPLE_KEY not in first or SAMPLE_KEY not in second:
        return True
    return first.get(ROWS_KEY) == second.get(ROWS_KEY) and _is_same(first[SAMPLE_KEY], second[SAMPLE_KEY])


def _is_same(saved: Sequence[float], sample: Sequence[float]) -> bool:
    drift = max((abs(a - b) for a, b in zip(saved, sample, strict=False)), default=0.0)
    return bool(sample) and drift <= SAMPLE_TOLERANCE * max(abs(x) for x in saved)
