"""Evaluation and training mode for the length of a block; each module's own mode is restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from softtune.backbone.quantization import unpacked


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, for the length of the block, with 4-bit weights left as they are."""
    with _in_mode(model, training=False), unpacked(model), torch.no_grad():
        yield


def training(model: nn.Module) -> AbstractContextManager[None]:
    """Training mode for the length of the block."""
    return _in_mode(model, training=True)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training is not training]
    model.train(training)
    try:
        yield
    finally:
        for module in others:
            module.training = not training
