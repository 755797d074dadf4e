"""How many threads of the CPU compute a step: the fastest number, on a busy machine fewer than there are."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from softtune.backbone import Backbone

TOKENS = 16
"""Tokens of the products that are timed, as in a step that writes for some texts at once."""


def fastest_num_threads(backbone: Backbone, seconds: float = 0.5) -> int:
    """The number of threads, of 1, 2, 4 and so on to as many as torch has, that computes the products of one layer of
    the base model the fastest; as many as torch has where it is not on a CPU.

    Args:
        backbone: the base model.
        seconds: how long to try, over all numbers.
    """
    before: int = torch.get_num_threads()
    weights = [
        module.weight
        for module in backbone.stacks[0].layers[0].modules()
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and module.weight.is_floating_point()
    ]
    numbers: list[int] = [2**power for power in range(before.bit_length()) if 2**power < before] + [before]
    if not weights or len(numbers) == 1:
        return before
    try:
        found = {number: _seconds(weights, number, seconds / len(numbers)) for number in numbers}
    finally:
        torch.set_num_threads(before)
    fastest: int = min(found, key=found.__getitem__)
    return fastest


@torch.inference_mode()
def _seconds(weights: Sequence[torch.Tensor], threads: int, limit: float) -> float:
    """The least seconds that products with these weights took, by some threads, of all tries within a limit."""
    torch.set_num_threads(threads)
    states = [torch.ones(TOKENS, weight.shape[1], dtype=weight.dtype) for weight in weights]
    least, end = float("inf"), time.perf_counter() + limit
    while time.perf_counter() < end or least == float("inf"):
        start = time.perf_counter()
        for state, weight in zip(states, weights, strict=True):
            F.linear(state, weight)
        least = min(least, time.perf_counter() - start)
    return least
