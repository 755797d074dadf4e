"""Prompts and attention masks to try things on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from softtune.backbone import AttentionLayer, Backbone
from softtune.methods.prompt import KeyValue, Prompt

Rows = list[list[int]]


@st.composite
def masks(draw: st.DrawFn) -> Rows:
    """Attention masks with padding on any side of each row's text, which has a token at least."""
    length = draw(st.integers(1, 6))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left))
        rows.append([0] * left + [1] * (length - left - right) + [0] * right)
    return rows


def prefix(layers: Sequence[AttentionLayer], length: int = 2, **options: Any) -> Prompt:
    """A random prefix in these layers, which takes positions."""
    prefixes = {
        a.place: KeyValue(torch.randn(a.heads, length, a.key_size), torch.randn(a.heads, length, a.value_size))
        for a in layers
    }
    return Prompt(num_virtual_tokens=length, prefixes=prefixes, **{"shifts_positions": True, **options})


def vectors(backbone: Backbone, length: int = 2, **options: Any) -> Prompt:
    """Random virtual tokens at the input."""
    width = backbone.embedding.embedding_dim
    return Prompt(num_virtual_tokens=length, vectors=torch.randn(length, width), **options)
