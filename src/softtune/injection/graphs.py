"""Decisions that go by a batch's numbers, which the maker of a graph for any batch cannot make: it takes what is right
for all."""

from __future__ import annotations

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.errors import UnsupportedModelError


def is_for_any_batch() -> bool:
    """Whether ``torch.export`` makes a graph."""
    return torch.compiler.is_exporting()


def holds(condition: Tensor, *, for_any: bool) -> bool:
    """Whether a condition on numbers holds.

    Args:
        condition: [] the condition.
        for_any: what to suppose for any batch.
    """
    return for_any if is_for_any_batch() else bool(condition)


def check_graph(backbone: Backbone, text: Tensor | None) -> None:
    """Raise UnsupportedModelError where a graph is made that cannot be right.

    Args:
        backbone: the base model's.
        text: [B, T] or [B, T, D] the input.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise UnsupportedModelError("torch.jit.trace keeps the shapes of one batch: use torch.export")
    if is_for_any_batch() and not backbone.is_known:
        raise UnsupportedModelError("the model has not run yet: call it once, with any text, before torch.export")
    if is_for_any_batch() and text is not None and not all(type(size) is int for size in text.shape[:2]):
        raise UnsupportedModelError("a graph is for one shape: leave out dynamic_shapes, and make one for each")
