"""An attention wrapper that prepends a prefix to a layer's keys and values.

The wrapper puts each layer's prefix before its keys, widens the mask by P columns and calls the stock attention
function. The model's cache counts the text alone. Knows nothing about mask formats. Letters: B rows, H key/value
heads, T queries, S keys, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone.interface import Attention, Mask
from softtune.injection.cache import prepend
from softtune.injection.masks import MASKS, LayerShape, Masks
from softtune.methods.prompt import KeyValue


class PrefixAttention:
    """An attention wrapper that adds a prefix. It lives for one forward and its recomputation in the backward pass.

    Args:
        prefixes: each attention module's prefix; other modules are passed through.
        visible: [B or 1, T or 1, P] which queries see a module's prefix; all of them where a module has no entry.
        biases: [B, heads, T, P] biases of a module's scores of the prefix, in models with relative position biases.
        cached: modules whose keys and values contain the prefix already, from the cache.
        crossing: cross-attention modules.
        open_slots: [B, T or 1, S] slots that queries see beyond sliding windows too.
    """

    def __init__(
        self,
        prefixes: Mapping[nn.Module, KeyValue],
        *,
        visible: Mapping[nn.Module, Tensor],
        biases: Mapping[nn.Module, Tensor],
        cached: Collection[nn.Module] = (),
        crossing: Collection[nn.Module] = (),
        open_slots: Tensor | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.visible = visible
        self.biases = biases
        self.cached = cached
        self.crossing = crossing
        self.open_slots = open_slots
        self.reached: set[int] = set()
        """The ``id`` of each module that has called the wrapper. One of ``prefixes`` that is missing after a forward
        has ignored its prefix. The compiler takes modules of one class for one another, but not their ids."""
        self._masks: dict[tuple[int, int, int, bool, int], tuple[Mask, Mask]] = {}
        self._open_masks: dict[int, tuple[Mask, Mask]] = {}

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        prefix = self.prefixes.get(module)
        if prefix is None and self.open_slots is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        masks = MASKS[attend.form]
        length = 0 if prefix is None else prefix.key.shape[2]
        text = self._text(module, query, key.shape[2] - (length if module in self.cached else 0), kwargs)
        mask, arguments = self._opened(masks, attention_mask, text), masks.arguments(text)
        if prefix is None:
            return attend(module, query, key, value, mask, **{**arguments, "is_causal": text.is_causal})
        self.reached.add(id(module))
        if module not in self.cached:
            key, value = prepend(prefix.key, key), prepend(prefix.value, value)
        mask = self._widened(module, masks, mask, text, length)
        if (bias := arguments.get("position_bias")) is not None:
            arguments["position_bias"] = self._with_bias(module, bias, length)
        output, weights = attend(module, query, key, value, mask, **arguments)
        return output, None if weights is None else weights[..., length:]

    def _text(self, module: nn.Module, query: Tensor, keys: int, arguments: Mapping[str, Any]) -> LayerShape:
        causal = arguments.get("is_causal")
        return LayerShape(
            query=query,
            keys=keys,
            is_causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            is_crossing=module in self.crossing,
            arguments=arguments,
        )

    def _opened(self, masks: Masks, mask: Mask, text: LayerShape) -> Mask:
        """The layer's mask with the open slots visible; made once for all layers that share a mask."""
        if self.open_slots is None:
            return mask
        if id(mask) not in self._open_masks:
            self._open_masks[id(mask)] = (mask, masks.opened(mask, self.open_slots, text))
        return self._open_masks[id(mask)][1]

    def _widened(self, module: nn.Module, masks: Masks, mask: Mask, text: LayerShape, length: int) -> Mask:
        """The layer's mask with P more columns; made once for all layers that share a mask."""
        visible = self.visible.get(module)
        slot = (id(mask), length, text.keys, text.is_causal, id(visible))
        if slot not in self._masks:
            self._masks[slot] = (mask, masks.widened(mask, visible, length, text))
        return self._masks[slot][1]

    def _with_bias(self, module: nn.Module, bias: Tensor, length: int) -> Tensor:
        """The model's score bias [B, heads, T, S] with the prefix's columns in front: [B, heads, T, P + S]."""
        added = self.biases.get(module, bias.new_zeros(1, bias.shape[1], 1, length)).to(bias.dtype)
        rows = max(len(bias), len(added))
        return torch.cat([added.expand(rows, -1, bias.shape[2], -1), bias.expand(rows, -1, -1, -1)], dim=-1)
