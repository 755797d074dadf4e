"""A prefix as a ready cache, for decoders whose attention does not go through the interface (Bloom, Falcon, MPT,
GPT-J...).

The cache answers every ``update`` with the prefix in front of what the real cache returns. Without a real cache it
keeps nothing, so that gradient checkpointing may call it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from softtune.methods.base import KeyValue


class PrefixCache(Cache):
    """Keys and values of a prefix in front of a text's.

    Args:
        prefixes: each layer's prefix.
        inner: the text's own cache; None to keep nothing.
    """

    def __init__(self, prefixes: Sequence[KeyValue], inner: Cache | None) -> None:
        super().__init__(layers=[])
        self.prefixes = list(prefixes)
        self.inner = inner
        self.length = prefixes[0].key.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [B, H, P + S, K] of a layer, the prefix first."""
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        return tuple(
            torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)
            for prefix, own in zip(self.prefixes[layer_idx], (key_states, value_states), strict=True)
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + (self.inner.get_seq_length(layer_idx) if self.inner is not None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length of the keys that a query sees, and the position of the first one."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.prefixes)

    @property
    def is_compileable(self) -> bool:
        return False
