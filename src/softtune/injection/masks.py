"""Widens a layer's attention mask for a prefix in front of the keys, in every format that attention functions take.

A dense mask says for each query which keys it sees, and so does a block mask, by a function: both get P more columns.
The padding mask of flash attention says which keys are padding; the kernel applies causality and windows itself. It
aligns the last query with the last key, so that every query sees what stands in front, and causality is unchanged.
What such a kernel cannot express raises an error. Letters: B rows, T queries, S keys, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, noop_mask

from softtune.backbone.interface import Mask, MaskForm, flash_refusal


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer's queries and keys, without a prefix."""

    query: Tensor
    """[B, heads, T, K]"""
    keys: int
    """S"""
    is_causal: bool
    """Whether a query sees no later key."""
    is_crossing: bool
    """Whether this is cross-attention."""
    arguments: Mapping[str, Any]
    """The attention function's other arguments, by name."""

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    def ones(self, *shape: int) -> Tensor:
        """A boolean mask that hides nothing."""
        return torch.ones(*shape, dtype=torch.bool, device=self.query.device)


class Masks(Protocol):
    """Operations on the masks of an attention function, in one of the formats."""

    def opened(self, mask: Mask, slots: Tensor, text: LayerShape) -> Mask:
        """The mask with open slots [B, T or 1, S], which queries see beyond sliding windows too."""

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: LayerShape) -> Mask:
        """The mask with P columns in front, visible to the queries that see the prefix.

        Args:
            mask: the layer's own mask.
            visible: [B or 1, T or 1, P] which queries see the prefix; None where all see all of it.
            length: P.
            text: the layer's queries and keys, without the prefix.
        """

    def arguments(self, text: LayerShape) -> dict[str, Any]:
        """The attention function's other arguments, as a widened mask needs them."""


PACKED = "cannot show a prefix to several texts packed into one row"


class DenseMasks:
    """Boolean or additive masks [B, 1, T, S]."""

    def opened(self, mask: Mask, slots: Tensor, text: LayerShape) -> Mask:
        if not isinstance(mask, Tensor):
            return mask
        seen = F.pad(slots, (0, mask.shape[-1] - slots.shape[-1]))[:, None]
        return mask | seen if mask.dtype == torch.bool else mask.masked_fill(seen, 0.0)

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: LayerShape) -> Mask:
        text_mask = mask if isinstance(mask, Tensor) else self._implied(visible, text)
        return None if text_mask is None else widen(text_mask, visible, length)

    def arguments(self, text: LayerShape) -> dict[str, Any]:
        return {**text.arguments, "is_causal": False}

    def _implied(self, visible: Tensor | None, text: LayerShape) -> Tensor | None:
        """[1, 1, T, S] the mask that attention without one implies; None where a prefix needs none."""
        is_causal = text.is_causal and text.queries > 1
        if visible is None and not is_causal:
            return None
        # Additive, since eager attention would add a boolean mask to the scores.
        mask = text.query.new_zeros(1, 1, text.queries, text.keys)
        later = text.ones(text.queries, text.keys).triu(1)
        return mask.masked_fill(later, torch.finfo(mask.dtype).min) if is_causal else mask


class BlockMasks:
    """Flex attention's block masks, which say by a function of row, head, query and key what is visible."""

    def opened(self, mask: Mask, slots: Tensor, text: LayerShape) -> Mask:
        if not isinstance(mask, BlockMask):
            return DenseMasks().opened(mask, slots, text)
        mask_mod = mask.mask_mod
        seen = F.pad(slots, (0, text.keys - slots.shape[-1])).expand(-1, text.queries, -1)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask_mod(row, head, query, key) | seen[row, query, key]

        return _block_mask(sees, text, text.keys)

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: LayerShape) -> Mask:
        if isinstance(mask, Tensor):
            return widen(mask, visible, length)
        if mask is None and visible is None:
            return None
        mask_mod = noop_mask if mask is None else mask.mask_mod
        seen = text.ones(1, 1, length) if visible is None else visible
        seen = seen.expand(len(text.query), text.queries, -1)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            sees_prefix = seen[row, query, key.clamp(max=length - 1)]
            sees_text = mask_mod(row, head, query, (key - length).clamp(min=0))
            return torch.where(key < length, sees_prefix, sees_text)

        return _block_mask(sees, text, length + text.keys)

    def arguments(self, text: LayerShape) -> dict[str, Any]:
        bias = text.arguments.get("position_bias")
        if bias is None:
            return {**text.arguments}
        # T5 has one bias for all rows, while flex attention indexes it by row.
        return {**text.arguments, "position_bias": bias.expand(len(text.query), -1, -1, -1)}


class PaddingMasks:
    """Flash attention's masks [B, S] of keys that are not padding; None where no key is padding."""

    def opened(self, mask: Mask, slots: Tensor, text: LayerShape) -> Mask:
        return mask

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: LayerShape) -> Mask:
        self._check(mask, visible, text)
        if mask is None and visible is None:
            return None
        rows = len(text.query)
        text_mask = mask.bool() if isinstance(mask, Tensor) else text.ones(rows, text.keys)
        front = text.ones(1, length) if visible is None else visible[:, 0]
        return torch.cat([front.expand(rows, -1), text_mask], dim=1)

    def arguments(self, text: LayerShape) -> dict[str, Any]:
        """The other arguments, without a window that the text does not fill, and without positions, by whose jumps the
        function detects packed texts.

        Raises:
            UnsupportedModelError: the window would hide virtual tokens, or there is a position bias.
        """
        window = text.arguments.get("sliding_window")
        if window is not None and text.keys > window:
            raise flash_refusal(f"hides virtual tokens behind a window of {window} tokens in a text of {text.keys}")
        if text.arguments.get("position_bias") is not None:
            raise flash_refusal("has no position bias for virtual tokens")
        kept = {name: value for name, value in text.arguments.items() if name not in ("sliding_window", "position_ids")}
        return {**kept, "is_causal": text.is_causal}

    def _check(self, mask: Mask, visible: Tensor | None, text: LayerShape) -> None:
        """Check that a padding mask can express what the queries see.

        Raises:
            UnsupportedModelError: it cannot.
        """
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise flash_refusal("takes no ready mask beside a prefix")
        if visible is not None and visible.shape[1] > 1:
            raise flash_refusal("cannot hide an infix from the tokens before it")
        if visible is not None and text.is_crossing and text.queries > 1:
            raise flash_refusal("takes the padding of the encoder's prefixes for that of the decoder's texts")
        if text.arguments.get("cu_seq_lens_q") is not None:
            raise flash_refusal(PACKED)


MASKS: dict[MaskForm, Masks] = {
    MaskForm.DENSE: DenseMasks(),
    MaskForm.BLOCKS: BlockMasks(),
    MaskForm.PADDING: PaddingMasks(),
}


def widen(mask: Tensor, visible: Tensor | None, length: int) -> Tensor:
    """[B or 1, 1, T, P + S] a mask [B or 1, 1, T or 1, S] with P columns in front, visible to the queries that see
    them."""
    widened = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if visible is None:
        return widened
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    rows, queries = max(len(visible), len(widened)), max(visible.shape[1], widened.shape[2])
    widened = widened.expand(rows, -1, queries, -1).clone()
    widened[..., :length].masked_fill_(~visible[:, None], closed)
    return widened


def _block_mask(sees: Callable[..., Tensor], text: LayerShape, keys: int) -> BlockMask:
    """Create a block mask. It is compiled, as in transformers, so the whole mask [B, 1, T, S] is never in memory."""
    rows, device = len(text.query), text.query.device
    return torch.compile(create_block_mask)(sees, rows, None, text.queries, keys, device)
