"""Caches that contain a prefix. Letters: B rows, H key/value heads, P virtual tokens, S tokens of the text.

``PrefixCache`` is for decoders that do not use the attention interface (Bloom, Falcon, MPT, GPT-J...): every ``update``
returns the prefix in front of what the text's own cache returns. Without such a cache it stores nothing, so that
gradient checkpointing may call it twice.

``PrefixLayer`` is for decoding with the attention interface: it stores the prefix in front of the text, so that no
step has to concatenate them again, and its length is that of the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from softtune.backbone import is_checkpointing
from softtune.compat import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from softtune.errors import AdapterError, UnsupportedModelError
from softtune.injection.layout import Layout
from softtune.injection.rows import multiplied
from softtune.injection.step import Call, Step
from softtune.methods.prompt import KeyValue


class PrefixCache(Cache):
    """A cache that returns a prefix's keys and values in front of the text's.

    Args:
        prefixes: each layer's prefix.
        inner: the text's own cache; None to store nothing.
        layout: for rows that start at different columns, since ALiBi counts the columns between keys; by default the
            prefix stands in front of all columns.
    """

    def __init__(self, prefixes: Sequence[KeyValue], inner: Cache | None, layout: Layout | None = None) -> None:
        super().__init__(layers=[])
        self.prefixes = list(prefixes)
        self.inner = inner
        self.layout = layout
        self.length = prefixes[0].key.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [B, H, P + S, K] of a layer, the prefix before the text."""
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        prefix = self.prefixes[layer_idx]
        return self._join(prefix.key, key_states), self._join(prefix.value, value_states)

    def _join(self, prefix: Tensor, states: Tensor) -> Tensor:
        if self.layout is None:
            return prepend(prefix, states)
        return self.layout.merge(states.transpose(1, 2), prefix.transpose(1, 2)).transpose(1, 2)

    def align_keys(self, weights: Tensor) -> Tensor:
        """Attention weights [B, H, Q, S] over the text, from [B, H, Q, P + S]."""
        return weights[..., self.length :] if self.layout is None else self.layout.align_keys(weights)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + (self.inner.get_seq_length(layer_idx) if self.inner is not None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that the queries attend to, and the position of the first one."""
        text_length = query_length if self.inner is None else self.inner.get_mask_sizes(query_length, layer_idx)[0]
        return self.length + text_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.prefixes)

    @property
    def is_compileable(self) -> bool:
        return False


class PrefixLayer(DynamicLayer):
    """A dynamic cache layer that starts with a prefix, and whose length is that of the text behind it.

    Args:
        prefix: the layer's prefix, for each row.
        dtype: of the base model.
    """

    def __init__(self, prefix: KeyValue, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers has no types here
        self.length = prefix.key.shape[2]
        keys, values = (part.to(dtype) for part in prefix)
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a text's keys and values. The prefix takes their precision, which FSDP2 may have lowered."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return super().get_seq_length() - self.length

    def holds(self, prefix: KeyValue) -> bool:
        """Whether the layer starts with this prefix."""
        assert self.keys is not None
        cached, other = self.keys[0, :, : self.length], prefix.key[0].to(self.keys.dtype)
        return bool(((cached == other) | (cached.isnan() & other.isnan())).all())  # NaN after a training that diverged

    def reset(self) -> None:
        """Drop the text, and keep the prefix."""
        self.crop(-self.get_seq_length())


def begin_with(prefixes: Mapping[Any, KeyValue], cache: Any, step: Step, dtype: torch.dtype) -> set[Any]:
    """Put prefixes into an empty cache, if gradients are off.

    Args:
        prefixes: each attention module's prefix.
        cache: the call's cache.
        step: the call.
        dtype: of the base model.

    Returns:
        The modules whose cache layer starts with their prefix.

    Raises:
        AdapterError: the cache starts with another prefix.
    """
    layers = dict(enumerate(cache.layers)) if type(cache) is DynamicCache else {}
    if layers and not step.is_continued and not torch.is_grad_enabled():
        for module, prefix in prefixes.items():
            if type(layers.get(module.layer_idx)) is DynamicLayer:
                layers[module.layer_idx] = cache.layers[module.layer_idx] = PrefixLayer(prefix, dtype)
    cached = {m: layer for m in prefixes if layers and isinstance(layer := layers.get(m.layer_idx), PrefixLayer)}
    for module, layer in list(cached.items())[:1]:  # one is enough: comparing all of them would cost too much
        if not layer.holds(prefixes[module]):
            raise AdapterError("the cache was computed with another adapter", "leave it out")
    return set(cached)


def make_room(cache: Any, is_virtual: Tensor) -> None:
    """Prepare an empty cache for virtual tokens at the input, which it keeps when they leave a sliding window.

    Args:
        cache: the stack's cache.
        is_virtual: [B, S] which of the first slots are virtual tokens.

    Raises:
        UnsupportedModelError: a static cache has no layer that is longer than a sliding window.
    """
    sizes = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
        elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            if not sizes:
                raise UnsupportedModelError(
                    "virtual tokens among the words outlive a window, for which a static cache has no place",
                    "leave out cache_implementation",
                )
            cache.layers[number] = StaticLayer(max(sizes) + int(is_virtual.sum(dim=1).max()))
    cache.softtune_virtual = is_virtual


def virtual_slots(cache: Any, slots: int, rows: int) -> Tensor:
    """[B, S] which slots of a cache, and of the step that continues from it, are virtual tokens."""
    is_virtual = multiplied(cache.softtune_virtual, rows)
    return F.pad(is_virtual, (0, slots - is_virtual.shape[1]))


def as_long_as(cache: Cache | None, mask: Tensor) -> Tensor:
    """[B, W] a mask padded to the length of a static cache, since Bloom computes ALiBi from it for all keys."""
    sizes = (
        [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)] if cache is not None else []
    )
    return F.pad(mask, (0, sizes[0] - mask.shape[1])) if sizes else mask


def own_cache(stack: PreTrainedModel, call: Call) -> Cache | None:
    """The call's cache, or a new one where the call uses a cache and no gradient checkpointing."""
    cache: Cache | None = call.get("cache")
    if cache is not None:
        return cache
    uses_cache = call.get("use_cache")
    uses_cache = getattr(stack.config, "use_cache", True) if uses_cache is None else uses_cache
    return DynamicCache(config=stack.config) if uses_cache and not is_checkpointing(stack) else None


def prepend(prefix: Tensor, states: Tensor) -> Tensor:
    """[B, H, P + S, K]: a prefix [B, H, P, K] in front of states [B, H, S, K]."""
    return torch.cat([prefix.to(states.dtype), states], dim=2)
