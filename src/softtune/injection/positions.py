"""Position ids of a batch's tokens, and whether the model has enough positions.

Positions count from each row's first real token, and continue behind a prefix or virtual tokens at the input.
Letters: B rows, T tokens of this call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softtune.backbone import Stack
from softtune.backbone.interface import flash_refusal, takes_padding
from softtune.backbone.positions import text_axis
from softtune.errors import DataError, UnsupportedModelError
from softtune.injection.arrangement import Arrangement
from softtune.injection.graphs import holds, is_exporting
from softtune.injection.masks import PACKED
from softtune.injection.rows import RowPrompts
from softtune.injection.step import Call, Step


@dataclass(frozen=True)
class Positions:
    """The position ids of one stack's calls."""

    stack: Stack
    has_prefix: bool
    """Whether any layer gets a prefix."""

    def check(self, call: Call, arrangement: Arrangement) -> None:
        """Check that no row needs more positions than the model has.

        Raises:
            DataError: a row needs more.
        """
        limit, step, row_prompts = self.stack.table_size, arrangement.step, arrangement.prompts
        if limit is None:
            return
        fits = step.width + _most_virtual(row_prompts) <= limit
        if is_exporting():
            if not fits:
                raise DataError(
                    f"a graph of {step.width} tokens exceeds the model's {limit} positions", "make a shorter one"
                )
            return
        if fits and call.get("position_ids") is None:
            return  # without waiting for the device
        tokens, virtual = (
            self._lengths(call, step, row_prompts),
            (row_prompts.shift + row_prompts.is_vector.sum(1)).to(step.device),
        )
        if int((tokens + virtual).max()) > limit:
            row = int((tokens + virtual).argmax())
            raise DataError(
                f"{int(tokens[row])} tokens and {int(virtual[row])} virtual ones exceed the model's {limit} positions",
                "shorten the text",
            )

    def count_text(self, call: Call, arrangement: Arrangement) -> None:
        """Recount position ids from each row's first real token, without virtual tokens, where the model above the
        stack has counted the columns of its cache and text, as PaliGemma and Fuyu do.

        Raises:
            UnsupportedModelError: such a model is being exported.
        """
        given = call.get("position_ids")
        if given is None or given.dim() != 2:
            return
        if is_exporting():
            raise UnsupportedModelError("the model counts positions above its layers", "export it with position_ids")
        columns = given[:1, :1] + torch.arange(given.shape[1], device=given.device)
        if not bool((given == columns).all()):
            return
        step, row_prompts = arrangement.step, arrangement.prompts
        if step.mask is not None:
            call["position_ids"] = step.positions() + int(given[0, 0]) - step.cached
        elif row_prompts.vectors is not None and step.is_continued:
            call["position_ids"] = given - row_prompts.is_vector.sum(dim=1, keepdim=True).to(given.device)

    def place(self, call: Call, arrangement: Arrangement) -> None:
        """Set position ids that count from each row's first real token, past the virtual tokens in front of it.

        Raises:
            UnsupportedModelError: virtual tokens have no place in packed texts, or among the positions of images.
        """
        if not self.stack.takes_position_ids:
            return
        step, row_prompts, layout = arrangement.step, arrangement.prompts, arrangement.layout
        axes = call.get("position_ids")
        if axes is None:
            if self._counts_itself(step, row_prompts):
                return
            axes = step.positions() + self.stack.first_position
        positions = text_axis(axes).expand(step.rows, -1)
        if row_prompts.vectors is not None and step.has_restarts(positions):
            raise UnsupportedModelError(
                "several texts packed into one row have no place for virtual tokens among the words", "pad them instead"
            )
        if self.has_prefix and takes_padding(self.stack.module.config) and step.has_restarts(positions):
            raise flash_refusal(PACKED)
        shift = self._shift(call, arrangement, positions)
        if layout is None:
            positions = axes + shift
        elif axes.dim() == 3:
            raise UnsupportedModelError(
                "virtual tokens among the words have no place among the positions of pictures", "use PrefixTuningConfig"
            )
        else:
            of_vectors = row_prompts.shift[:, None].to(step.device) * row_prompts.is_vector
            in_slots = layout.merge(shift.expand_as(positions), of_vectors)
            positions = layout.merge_positions(positions) + in_slots
        if (limit := self.stack.table_size) is not None:  # only padding is beyond it
            positions = positions.clamp(max=self.stack.first_position + limit - 1)
        call["position_ids"] = positions

    def _shift(self, call: Call, arrangement: Arrangement, positions: Tensor) -> Tensor:
        """[B, T] or [B, 1] shift of the tokens' positions [B, T] by virtual tokens that have no slot in this call."""
        step, row_prompts = arrangement.step, arrangement.prompts
        shift = row_prompts.shift[:, None].to(step.device)
        if row_prompts.vectors is not None and step.is_continued:
            return shift + row_prompts.is_vector.sum(dim=1, keepdim=True)
        if not (row_prompts.has_infix and row_prompts.shifts) or step.is_continued:
            return shift
        in_order = (positions.diff(dim=1) == 1).all()
        if call.get("attention_mask") is None and holds(in_order, when_exporting=True):
            # Without a mask, transformers takes a jump in the positions for the start of another packed text.
            call["attention_mask"] = step.full_mask()
        behind = step.is_from(arrangement.columns.infix_column(step, row_prompts)) | ~row_prompts.after_text[:, None]
        return shift * behind

    def _counts_itself(self, step: Step, row_prompts: RowPrompts) -> bool:
        """Whether the model's own positions, which count columns, are right."""
        needs_count = self.stack.is_causal and (step.mask is not None or row_prompts.is_ragged)
        return not self.stack.takes_position_ids or not (row_prompts.shifts or needs_count)

    def _lengths(self, call: Call, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B] number of positions that each row's text takes."""
        given: Tensor | None = call.get("position_ids")
        if given is not None:
            real = step.full_mask()[:, -step.length :] != 0
            return (given - self.stack.first_position + 1).expand(step.rows, -1).where(real, 0).amax(1)
        if self._counts_itself(step, row_prompts):
            return torch.full_like(step.starts, step.width)
        return step.ends - step.starts


def _most_virtual(row_prompts: RowPrompts) -> int:
    """At least the number of positions that any row's virtual tokens take."""
    shift = max((max(counts) for counts in row_prompts.lengths.values()), default=0) if row_prompts.shifts else 0
    return shift + int(row_prompts.is_vector.shape[1])
