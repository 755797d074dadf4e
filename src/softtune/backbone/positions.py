"""Position ids and position tables of single architectures.

Letters: A axes of positions, B rows, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softtune import compat
from softtune.errors import UnsupportedModelError


def column_dimension(argument: str) -> int:
    """The dimension of a stack's argument that counts columns: position ids are [A, B, T] in Qwen-VL."""
    return -1 if argument == "position_ids" else 1


def text_axis(positions: Tensor) -> Tensor:
    """[B, T] the positions of text, given position ids [B, T], or [A, B, T] of text, time, height and width."""
    return positions[0] if positions.dim() == 3 else positions


def look_up_shifted(
    stack: nn.Module,
    table: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    shift: Tensor,
) -> Tensor:
    """Look up shifted positions in the position table of BART-like models, which count positions themselves.

    Args:
        stack: the stack, for the error message.
        table: the module with the table.
        args: the positional arguments of a call of it.
        kwargs: its keyword arguments.
        output: [B or 1, T, D] what it returned, for positions that are not shifted.
        shift: [B] number of positions by which each row is shifted.

    Raises:
        UnsupportedModelError: the table does not take the length of the cache.
    """
    signature, shift = inspect.signature(table.forward), shift[:, None].to(output.device)
    length_name = compat.spelled("cache_length", signature.parameters)
    if length_name not in signature.parameters:
        raise UnsupportedModelError(
            f"{type(stack).__name__} counts positions in a way of its own", "set shift_positions=False"
        )
    call = signature.bind(*args, **kwargs).arguments
    past, positions = call.get(length_name, 0), call.get("position_ids")
    if not isinstance(table, nn.Embedding):  # M2M100's module, which gives padding no position
        for length in shift.unique().tolist():
            counted = {length_name: past + length}
            moved = counted if positions is None else {"position_ids": positions + length}
            output = output.where(shift[..., None] != length, table.forward(**call | moved))
        return output
    if positions is None:
        positions = torch.arange(output.shape[-2], device=output.device) + past
    return nn.functional.embedding(positions + shift + getattr(table, "offset", 0), table.weight)
