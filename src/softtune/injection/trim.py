"""Removes the columns that are padding in every row before the layers run, as if the batch were padded less.

Letters: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from softtune.backbone.positions import column_dimension
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.step import TEXT, Call, features_of


@dataclass(frozen=True)
class Trim:
    """Number of columns removed on either side."""

    left: int
    right: int

    @classmethod
    def from_mask(cls, mask: Tensor, *, keep_left: bool) -> Trim:
        """Columns to remove by an attention mask [B, T]; ``keep_left`` where the model counts positions itself."""
        left = 0 if keep_left else int(row_starts(mask, len(mask), mask.device).min())
        return cls(left, mask.shape[1] - int(row_ends(mask, len(mask), mask.shape[1], mask.device).max()))

    def cut(self, call: Call) -> None:
        """Remove the columns from a call's arguments."""
        for name in (*TEXT, *features_of(call)):
            if call.get(name) is not None:
                dim = column_dimension(name)
                call[name] = call[name].narrow(dim, self.left, call[name].shape[dim] - self.left - self.right)

    def restore(self, output: Any) -> None:
        """Put the removed columns back into the outputs, as zeros."""
        each_state(output, self._pad)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(a if a is None else self._pad(a, both=True) for a in output.attentions)
        if getattr(output, "cross_attentions", None) is not None:
            output.cross_attentions = tuple(a if a is None else self._pad(a) for a in output.cross_attentions)

    def _pad(self, states: Tensor, *, both: bool = False) -> Tensor:
        """Pad the second-to-last dimension, or the last two."""
        sides = (self.left, self.right)
        return F.pad(states, (*(sides if both else (0, 0)), *sides))


def each_state(output: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Apply a function to an output's hidden states."""
    if output.last_hidden_state is not None:
        output.last_hidden_state = change(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(change(states) for states in output.hidden_states)
