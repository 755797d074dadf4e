"""Tests that depend on the device: they run on a GPU, and are skipped in one line where there is none.

``SOFTTUNE_TEST_DEVICE=cpu`` runs them on the CPU instead, which shows that they test what they say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NO_GPU = "there is no GPU that CUDA finds"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where their device is missing, and leave them to ``make test-gpu``."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    is_missing = _name().startswith("cuda") and not torch.cuda.is_available()
    for item in here:
        if is_missing:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device of the tests, which computes float32 in full."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(_name())
    torch.set_float32_matmul_precision(before)


def _name() -> str:
    return os.environ.get("SOFTTUNE_TEST_DEVICE", "cuda")
