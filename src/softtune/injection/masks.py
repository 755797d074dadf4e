"""What a layer's mask becomes with a prefix in front of the keys, for every form that attention functions take.

A dense mask says of each query which keys it sees, and so does a block mask, by a function: both get P more columns.
The padding mask of flash attention says which keys are padding; the kernel knows causality and windows itself. It
aligns the last query with the last key, so that every query sees what stands in front, and causality stays as it was.
What such a kernel cannot express is refused. Letters: B rows, T queries, S keys, P virtual tokens.
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
class Text:
    """One layer's own queries and keys, without a prefix."""

    query: Tensor
    """[B, heads, T, K]"""
    keys: int
    """S"""
    is_causal: bool
    """Whether a query sees no later key."""
    is_crossing: bool
    """Whether the keys are those of another sequence."""
    arguments: Mapping[str, Any]
    """What else the attention function is given, by name."""

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    def ones(self, *shape: int) -> Tensor:
        """A mask that hides nothing."""
        return torch.ones(*shape, dtype=torch.bool, device=self.query.device)


class Masks(Protocol):
    """What an attention function is told of its queries' view, in one of the forms."""

    def opened(self, mask: Mask, slots: Tensor, text: Text) -> Mask:
        """The mask with slots [B, T or 1, S] that queries see through windows too."""

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: Text) -> Mask:
        """The mask with P columns in front, open to the queries that see them.

        Args:
            mask: the layer's own.
            visible: [B or 1, T or 1, P] which queries see the prefix; None where all see all of it.
            length: P.
            text: the layer's own queries and keys.
        """

    def arguments(self, text: Text) -> dict[str, Any]:
        """What else the attention function is given beside such a mask."""


PACKED = "cannot show a prefix to several texts packed into one row"


class DenseMasks:
    """Masks [B, 1, T, S] of truth values, or of zeros and very low numbers."""

    def opened(self, mask: Mask, slots: Tensor, text: Text) -> Mask:
        if not isinstance(mask, Tensor):
            return mask
        seen = F.pad(slots, (0, mask.shape[-1] - slots.shape[-1]))[:, None]
        return mask | seen if mask.dtype == torch.bool else mask.masked_fill(seen, 0.0)

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: Text) -> Mask:
        own = mask if isinstance(mask, Tensor) else self._implied(visible, text)
        return None if own is None else widen(own, visible, length)

    def arguments(self, text: Text) -> dict[str, Any]:
        return {**text.arguments, "is_causal": False}

    def _implied(self, visible: Tensor | None, text: Text) -> Tensor | None:
        """[1, 1, T, S] the mask that an attention without one stands for; None where it needs none."""
        is_causal = text.is_causal and text.queries > 1
        if visible is None and not is_causal:
            return None
        # Numbers to add: eager attention adds truth values as if they were numbers.
        mask = text.query.new_zeros(1, 1, text.queries, text.keys)
        later = text.ones(text.queries, text.keys).triu(1)
        return mask.masked_fill(later, torch.finfo(mask.dtype).min) if is_causal else mask


class BlockMasks:
    """Flex attention's masks, which say by a function of row, head, query and key what is seen."""

    def opened(self, mask: Mask, slots: Tensor, text: Text) -> Mask:
        if not isinstance(mask, BlockMask):
            return DenseMasks().opened(mask, slots, text)
        own = mask.mask_mod
        seen = F.pad(slots, (0, text.keys - slots.shape[-1])).expand(-1, text.queries, -1)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return own(row, head, query, key) | seen[row, query, key]

        return _block_mask(sees, text, text.keys)

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: Text) -> Mask:
        if isinstance(mask, Tensor):
            return widen(mask, visible, length)
        if mask is None and visible is None:
            return None
        own = noop_mask if mask is None else mask.mask_mod
        seen = text.ones(1, 1, length) if visible is None else visible
        seen = seen.expand(len(text.query), text.queries, -1)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            sees_prefix = seen[row, query, key.clamp(max=length - 1)]
            sees_text = own(row, head, query, (key - length).clamp(min=0))
            return torch.where(key < length, sees_prefix, sees_text)

        return _block_mask(sees, text, length + text.keys)

    def arguments(self, text: Text) -> dict[str, Any]:
        bias = text.arguments.get("position_bias")
        if bias is None:
            return {**text.arguments}
        # T5 has one bias for all rows, flex attention looks for each row's own.
        return {**text.arguments, "position_bias": bias.expand(len(text.query), -1, -1, -1)}


class PaddingMasks:
    """Flash attention's masks [B, S] of keys that are no padding; None where none is."""

    def opened(self, mask: Mask, slots: Tensor, text: Text) -> Mask:
        return mask

    def widened(self, mask: Mask, visible: Tensor | None, length: int, text: Text) -> Mask:
        self._check(mask, visible, text)
        if mask is None and visible is None:
            return None
        rows = len(text.query)
        own = mask.bool() if isinstance(mask, Tensor) else text.ones(rows, text.keys)
        front = text.ones(1, length) if visible is None else visible[:, 0]
        return torch.cat([front.expand(rows, -1), own], dim=1)

    def arguments(self, text: Text) -> dict[str, Any]:
        """Less a window that the text does not fill, and positions, by whose jumps the function tells packed texts."""
        window = text.arguments.get("sliding_window")
        if window is not None and text.keys > window:
            raise flash_refusal(f"hides virtual tokens behind a window of {window} tokens in a text of {text.keys}")
        if text.arguments.get("position_bias") is not None:
            raise flash_refusal("has no position bias for virtual tokens")
        kept = {name: value for name, value in text.arguments.items() if name not in ("sliding_window", "position_ids")}
        return {**kept, "is_causal": text.is_causal}

    def _check(self, mask: Mask, visible: Tensor | None, text: Text) -> None:
        """Refuse what a padding mask cannot say."""
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
    """[B or 1, 1, T, P + S] a ready mask [B or 1, 1, T, S] with P columns in front, open to those that see them."""
    widened = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if visible is None:
        return widened
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    widened = widened.expand(max(len(visible), len(widened)), -1, -1, -1).clone()
    widened[..., :length].masked_fill_(~visible[:, None], closed)
    return widened


def _block_mask(sees: Callable[..., Tensor], text: Text, keys: int) -> BlockMask:
    """Compiled, as transformers does it: the whole mask [B, 1, T, S] is never in memory."""
    rows, device = len(text.query), text.query.device
    return torch.compile(create_block_mask)(sees, rows, None, text.queries, keys, device)
