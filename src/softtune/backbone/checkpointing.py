"""Gradient checkpointing: layers are recomputed in the backward pass, after the forward call has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from softtune.compat import CHECKPOINT, CHECKPOINTS, KEEPS_CACHE, GradientCheckpointingLayer


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model or stack recomputes its layers in the backward pass."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return model.training and any(getattr(layer, CHECKPOINTS) for layer in layers)


def is_reentrant(stack: nn.Module) -> bool:
    """Whether a stack's layers use reentrant checkpointing in this call."""
    if not (torch.is_grad_enabled() and is_checkpointing(stack)):
        return False
    return any(partial(f).keywords.get("use_reentrant", True) for f in _functions(stack).values())


@contextmanager
def around_runs(model: nn.Module, context: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Run each checkpointed layer that is called in the block inside a context, also when it is recomputed.

    Args:
        model: the model.
        context: makes the context for a layer; called once for each run.
    """
    plain = _functions(model)
    for layer, function in plain.items():
        settings = partial(function).keywords  # to be read by is_reentrant
        setattr(layer, CHECKPOINT, partial(_run_within, partial(context, layer), function, **settings))
    try:
        yield
    finally:
        for layer, function in plain.items():
            setattr(layer, CHECKPOINT, function)


@contextmanager
def without_gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing off for the length of the block: nothing would recompute the tensors kept in it."""
    checkpointed: list[Any] = [m for m in model.modules() if getattr(m, CHECKPOINTS, False)]
    for module in checkpointed:
        setattr(module, CHECKPOINTS, False)
    try:
        yield
    finally:
        for module in checkpointed:
            setattr(module, CHECKPOINTS, True)


@contextmanager
def keeping_caches(model: nn.Module) -> Iterator[None]:
    """Let checkpointed layers use a cache, for the length of the block: one that recomputation may read again."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        setattr(layer, KEEPS_CACHE, True)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, KEEPS_CACHE)


def _functions(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    return {m: vars(m)[CHECKPOINT] for m in model.modules() if CHECKPOINT in vars(m)}


def _run_within(
    context: Callable[[], AbstractContextManager[None]],
    checkpoint: Callable[..., Any],
    layer: Callable[..., Any],
    *args: Any,
    **settings: Any,
) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return layer(*args, **kwargs)

    return checkpoint(run, *args, **settings)
