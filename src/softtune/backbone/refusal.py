"""Refuses base models that do not read plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from softtune.errors import SofttuneError, UnsupportedModelError
from softtune.wording import in_one_line


@contextmanager
def reading_text(model: nn.Module, bare: Callable[[], Any] | None = None) -> Iterator[None]:
    """Say in one line that a model failed to read token ids alone, in the block.

    Args:
        model: the model.
        bare: runs it without what softtune puts into it in the block; nothing by default. Where that runs, the error
            is softtune's own and stays as it is.

    Raises:
        UnsupportedModelError: it did.
    """
    try:
        yield
    except (SofttuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if bare and _runs(bare):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on token ids alone ({in_one_line(error)}): use a base model that "
            "reads text"
        ) from error


def _runs(bare: Callable[[], Any]) -> bool:
    try:
        bare()
    except Exception:
        return False
    return True
