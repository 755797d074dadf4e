"""Support for ``torch.export``.

An exported graph serves any batch of its shape. So what otherwise depends on a batch's values, such as leaving out
padding, is done in the way that is right for every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.errors import UnsupportedModelError


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing the model."""
    return torch.compiler.is_exporting()


def holds(condition: Tensor, *, when_exporting: bool) -> bool:
    """Whether a condition on a batch's values is true.

    Args:
        condition: [] the condition, a boolean tensor.
        when_exporting: the result while exporting, for any batch.
    """
    return when_exporting if is_exporting() else bool(condition)


def check_graph(backbone: Backbone, text: Tensor | None) -> None:
    """Check that the model can be exported, where it is being traced.

    Args:
        backbone: the base model.
        text: [B, T] or [B, T, D] the input.

    Raises:
        UnsupportedModelError: ``torch.jit.trace`` is used, the model has not run yet, or a shape is dynamic.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise UnsupportedModelError("torch.jit.trace keeps the shapes of one batch", "use torch.export")
    if is_exporting() and not backbone.is_known:
        raise UnsupportedModelError("the model has not run yet", "call it once, with any text, before torch.export")
    if is_exporting() and text is not None and not all(type(size) is int for size in text.shape[:2]):
        raise UnsupportedModelError("a graph is for one shape", "leave out dynamic_shapes, and make one for each")
