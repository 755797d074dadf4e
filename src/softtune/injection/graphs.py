"""``torch.export``: a graph serves any batch of its shape, so that what usually depends on a batch's numbers, such as
leaving out padding, is done in the way that is right for every batch."""

from __future__ import annotations

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.errors import UnsupportedModelError


def is_exporting() -> bool:
    """Whether ``torch.export`` makes a graph."""
    return torch.compiler.is_exporting()


def holds(condition: Tensor, *, when_exporting: bool) -> bool:
    """Whether a condition on numbers holds.

    Args:
        condition: [] the condition.
        when_exporting: what to suppose for any batch.
    """
    return when_exporting if is_exporting() else bool(condition)


def check_graph(backbone: Backbone, text: Tensor | None) -> None:
    """Look whether a graph that is being made can be right.

    Args:
        backbone: the base model's.
        text: [B, T] or [B, T, D] the input.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise UnsupportedModelError("torch.jit.trace keeps the shapes of one batch: use torch.export")
    if is_exporting() and not backbone.is_known:
        raise UnsupportedModelError("the model has not run yet: call it once, with any text, before torch.export")
    if is_exporting() and text is not None and not all(type(size) is int for size in text.shape[:2]):
        raise UnsupportedModelError("a graph is for one shape: leave out dynamic_shapes, and make one for each")
