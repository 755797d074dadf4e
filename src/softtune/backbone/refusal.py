"""Refuses base models that do not run on token ids alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from softtune.errors import SofttuneError, UnsupportedModelError
from softtune.formatting import in_one_line


@contextmanager
def reading_text(model: nn.Module, bare: Callable[[], Any] | None = None) -> Iterator[None]:
    """Replace errors of a model that is run on token ids alone, in the block, by a one-line error.

    Args:
        model: the model.
        bare: runs the model without softtune's changes; by default this is not tried. Where it succeeds, the error is
            softtune's own and is raised unchanged.

    Raises:
        UnsupportedModelError: the model does not run on token ids alone.
    """
    try:
        yield
    except (SofttuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if bare and _runs(bare):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on token ids alone ({in_one_line(error)})",
            "use a base model that reads text",
        ) from error


def _runs(bare: Callable[[], Any]) -> bool:
    try:
        bare()
    except Exception:
        return False
    return True
