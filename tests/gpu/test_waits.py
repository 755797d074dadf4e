"""PyTorch's own count of a GPU's waits: as many with two layers as with six (``tests/test_transfers.py`` on a GPU)."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.families import CAUSAL_LM
from tests.gpu.running import adapted_on, output_on

METHODS = ("prompt", "prefix", "infix", "p_tuning_v2", "bitfit_added")


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_waits(device: torch.device, method: str) -> None:
    if device.type != "cuda":
        pytest.skip("PyTorch counts the waits of CUDA devices alone")
    assert waits(device, method, 2) == waits(device, method, 6)


def waits(device: torch.device, method: str, layers: int) -> int:
    """Waits of a training step, of the second such step."""
    model = adapted_on(device, "llama", CAUSAL_LM, method, num_hidden_layers=layers).train()
    output_on(device, model, "llama", CAUSAL_LM).loss.backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            output_on(device, model, "llama", CAUSAL_LM).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in told)
