"""Keys and values in front of a layer's own, at the one injection point.

The wrapper puts each layer's prefix before its keys, widens the mask by P columns and calls the stock attention
function. The model's cache counts the text alone. Letters: B rows, H key/value heads, T queries, S keys, P virtual
tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softtune.backbone.interface import Attention
from softtune.injection.cache import prepend
from softtune.methods.base import KeyValue


class PrefixAttention:
    """An attention wrapper that adds a prefix. It lives for one forward, and its recomputation in the backward pass.

    Args:
        prefixes: each attention module's prefix; other modules are passed through.
        visible: [B or 1, T or 1, P] which queries see a module's prefix; all of them where there is nothing.
        biases: [B, heads, T, P] what is added to a module's scores of the prefix, in models with relative position
            biases.
        held: modules whose cache brings the prefix along already.
        open_slots: [B, T or 1, S] slots that queries see through windows too.
    """

    def __init__(
        self,
        prefixes: Mapping[nn.Module, KeyValue],
        *,
        visible: Mapping[nn.Module, Tensor],
        biases: Mapping[nn.Module, Tensor],
        held: Collection[nn.Module] = (),
        open_slots: Tensor | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.visible = visible
        self.biases = biases
        self.held = held
        self.open_slots = open_slots
        self.reached: set[nn.Module] = set()
        """Modules that have called: all of ``prefixes`` after a forward, or the prefix has been ignored somewhere."""
        self._masks: dict[tuple[int, int, bool, int], tuple[Tensor | None, Tensor | None]] = {}
        self._open_masks: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attention_mask = self._opened(attention_mask)
        prefix = self.prefixes.get(module)
        if prefix is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        self.reached.add(module)
        causal = kwargs.pop("is_causal", None)
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if module not in self.held:
            key, value = prepend(prefix.key, key), prepend(prefix.value, value)
        length = prefix.key.shape[2]
        mask = self._widened(module, attention_mask, query, key, bool(causal), length)
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = self._with_bias(module, bias, length)
        output, weights = attend(module, query, key, value, mask, is_causal=False, **kwargs)
        return output, None if weights is None else weights[..., length:]

    def _opened(self, mask: Tensor | None) -> Tensor | None:
        """The layer's mask with the open slots visible to all; made once for all layers that share a mask."""
        if mask is None or self.open_slots is None:
            return mask
        if id(mask) not in self._open_masks:
            seen = F.pad(self.open_slots, (0, mask.shape[-1] - self.open_slots.shape[-1]))[:, None]
            opened = mask | seen if mask.dtype == torch.bool else mask.masked_fill(seen, 0.0)
            self._open_masks[id(mask)] = (mask, opened)
        return self._open_masks[id(mask)][1]

    def _widened(
        self, module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, length: int
    ) -> Tensor | None:
        """The layer's mask with P more columns; made once for all layers that share a mask."""
        visible = self.visible.get(module)
        slot = (id(mask), key.shape[2], causal, id(visible))
        if slot not in self._masks:
            own = _own_mask(visible, query, key.shape[2] - length, causal) if mask is None else mask
            self._masks[slot] = (mask, None if own is None else widen(own, visible, length))
        return self._masks[slot][1]

    def _with_bias(self, module: nn.Module, own: Tensor, length: int) -> Tensor:
        """The model's score bias [B, heads, T, S] with the prefix's columns in front."""
        added = self.biases.get(module, own.new_zeros(1, own.shape[1], 1, length)).to(own.dtype)
        rows = max(len(own), len(added))
        return torch.cat([added.expand(rows, -1, own.shape[2], -1), own.expand(rows, -1, -1, -1)], dim=-1)


def _own_mask(visible: Tensor | None, query: Tensor, keys: int, causal: bool) -> Tensor | None:
    """[1, 1, T, S] the mask that an attention without one stands for; None where it needs none."""
    queries = query.shape[2]
    if visible is None and (not causal or queries == 1):
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    return (mask.tril() if causal and queries > 1 else mask)[None, None]


def widen(mask: Tensor, visible: Tensor | None, length: int) -> Tensor:
    """[B or 1, 1, T, P + S] a ready mask [B or 1, 1, T, S] with P columns in front, open to those that see them."""
    widened = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if visible is None:
        return widened
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    widened = widened.expand(max(len(visible), len(widened)), -1, -1, -1).clone()
    widened[..., :length].masked_fill_(~visible[:, None], closed)
    return widened
