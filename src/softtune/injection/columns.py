"""The columns where virtual tokens stand in the caller's rows: in front of the text, at its end, or as in a template.

Letters: B rows, N virtual tokens at the input, T columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softtune.errors import DataError
from softtune.injection.rows import RowPrompts, multiplied
from softtune.injection.step import Step
from softtune.injection.trim import Trim


@dataclass(frozen=True)
class Columns:
    """The virtual tokens' columns in a batch, which all its calls share."""

    given: Tensor | None
    """[B, N] the caller's ``prompt_positions``; None where the columns follow from the prompts."""
    text_ends: Tensor | None
    """[B] where the texts end; None until a call shows it."""
    trim: Trim | None = None
    """The columns that a call leaves out."""

    def in_call(self, step: Step, row_prompts: RowPrompts, trim: Trim | None) -> Columns:
        """The columns in one call. Texts end behind the last token of the first, where nothing else is said: decoding
        without a cache calls again with a longer text."""
        ends = self.text_ends
        if self.given is None and row_prompts.has_suffix and ends is None:
            ends = step.ends + (trim.left if trim else 0)
        return replace(self, text_ends=ends, trim=trim)

    def vector_columns(self, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B, N] the column before which each virtual token stands; [B, 1] for an infix without given columns.

        Raises:
            DataError: the given columns are outside the text, or do not ascend.
        """
        cut = self.trim.left if self.trim else 0
        if self.given is not None:
            return (self._checked(step) - cut).clamp(0, step.length)
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
                f"prompt_positions from {int(columns.min())} to {int(columns.max())} do not fit",
                f"give columns from 0 to {length}",
            )
        if bool((columns.diff(dim=1) < 0).any()):
            raise DataError("prompt_positions do not ascend", "give each row's columns in ascending order")
        return columns

    def infix_column(self, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B, 1] the column before which the infix stands.

        Raises:
            DataError: the given columns of a row's infix differ.
        """
        columns = self.vector_columns(step, row_prompts)
        if bool((columns != columns[:, :1]).any(dim=1).logical_and(row_prompts.after_text).any()):
            raise DataError("an infix stands at one place of a text", "write its virtual tokens next to one another")
        return columns[:, :1]
