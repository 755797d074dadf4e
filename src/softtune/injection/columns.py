"""The columns where virtual tokens stand in the caller's rows: in front of the text, at its end, or as in a template.

Letters: B rows, N virtual tokens at the input, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtune.errors import DataError
from softtune.injection.rows import RowPrompts, multiplied
from softtune.injection.step import Step
from softtune.injection.trim import Trim


class Columns:
    """The virtual tokens' columns in one batch, over all its calls.

    Args:
        given: [B, N] the caller's ``prompt_positions``; by default they follow from the prompts.
        text_ends: [B] where the texts end; by default behind the last token of the first call.
    """

    def __init__(self, given: Tensor | None, text_ends: Tensor | None) -> None:
        self.given = given
        self.text_ends = text_ends
        self.trim: Trim | None = None
        """The columns that the present call leaves out."""

    def of_vectors(self, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B, N] the column before which each virtual token stands; [B, 1] for an infix without given columns."""
        cut = self.trim.left if self.trim else 0
        if self.given is not None:
            return (self._checked(step) - cut).clamp(0, step.length)
        if row_prompts.has_suffix and self.text_ends is None:
            self.text_ends = cut + step.ends  # kept, since decoding without a cache calls again with a longer text
        columns = step.starts
        if row_prompts.has_suffix and self.text_ends is not None:
            ends = multiplied(self.text_ends.to(step.device), step.rows) - cut
            columns = torch.where(row_prompts.after_text, ends.clamp(0, step.length), columns)
        return columns[:, None].expand(-1, max(row_prompts.is_vector.shape[1], 1))

    def _checked(self, step: Step) -> Tensor:
        assert self.given is not None
        columns = multiplied(self.given.to(step.device), step.rows)
        length = step.length + (self.trim.left + self.trim.right if self.trim else 0)
        if not 0 <= int(columns.min()) <= int(columns.max()) <= length:
            raise DataError(
                f"prompt_positions from {int(columns.min())} to {int(columns.max())} do not fit: "
                f"give columns from 0 to {length}"
            )
        if bool((columns.diff(dim=1) < 0).any()):
            raise DataError("prompt_positions do not ascend: give each row's columns in ascending order")
        return columns

    def of_infix(self, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B, 1] the column before which the infix stands.

        Raises:
            DataError: the given columns of a row's infix differ.
        """
        columns = self.of_vectors(step, row_prompts)
        if bool((columns != columns[:, :1]).any(dim=1).logical_and(row_prompts.after_text).any()):
            raise DataError("an infix stands at one place of a text: write its virtual tokens next to one another")
        return columns[:, :1]
