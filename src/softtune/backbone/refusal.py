"""Refuses base models that do not read plain text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from softtune.errors import SofttuneError, UnsupportedModelError
from softtune.wording import in_one_line


@contextmanager
def reading_text(model: nn.Module) -> Iterator[None]:
    """Say in one line that a model failed to read token ids alone, in the block.

    Raises:
        UnsupportedModelError: it did.
    """
    try:
        yield
    except (SofttuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on token ids alone ({in_one_line(error)}): use a base model that "
            "reads text"
        ) from error
