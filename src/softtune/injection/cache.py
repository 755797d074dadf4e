"""Prefixes in caches. Letters: B rows, H key/value heads, P virtual tokens, S tokens of the text.

``PrefixCache`` serves decoders whose attention does not go through the interface (Bloom, Falcon, MPT, GPT-J...): it
answers every ``update`` with the prefix in front of what the text's own cache returns. Without such a cache it keeps
nothing, so that gradient checkpointing may call it twice.

``PrefixLayer`` serves decoding through the interface: it holds the prefix in front of the text once and for all, so
that a step need not join them again, and counts the text alone.
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
from softtune.methods.base import KeyValue


class PrefixCache(Cache):
    """Keys and values of a prefix in front of a text's.

    Args:
        prefixes: each layer's prefix.
        inner: the text's own cache; None to keep nothing.
        layout: where rows begin at different columns, since linear biases count the columns between keys; by default
            the prefix stands in front of all columns.
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

    def _join(self, prefix: Tensor, own: Tensor) -> Tensor:
        if self.layout is None:
            return prepend(prefix, own)
        return self.layout.merge(own.transpose(1, 2), prefix.transpose(1, 2)).transpose(1, 2)

    def align_keys(self, weights: Tensor) -> Tensor:
        """Attention weights [B, H, Q, S] over the text, out of [B, H, Q, P + S]."""
        return weights[..., self.length :] if self.layout is None else self.layout.align_keys(weights)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + (self.inner.get_seq_length(layer_idx) if self.inner is not None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length of the keys that a query sees, and the position of the first one."""
        own = query_length if self.inner is None else self.inner.get_mask_sizes(query_length, layer_idx)[0]
        return self.length + own, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.prefixes)

    @property
    def is_compileable(self) -> bool:
        return False


class PrefixLayer(DynamicLayer):
    """A growing cache layer that begins with a prefix, and has the length of the text behind it.

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

    def get_seq_length(self) -> int:
        return super().get_seq_length() - self.length

    def holds(self, prefix: KeyValue) -> bool:
        """Whether this is the prefix that the layer begins with."""
        assert self.keys is not None
        own, other = self.keys[0, :, : self.length], prefix.key[0].to(self.keys.dtype)
        return bool(((own == other) | (own.isnan() & other.isnan())).all())  # after a training that blew up

    def reset(self) -> None:
        """Forget the text."""
        self.crop(-self.get_seq_length())


def begin_with(prefixes: Mapping[Any, KeyValue], cache: Any, step: Step, dtype: torch.dtype) -> set[Any]:
    """Put prefixes that are not being trained into an empty cache; the modules whose layer of a cache holds one."""
    layers = dict(enumerate(cache.layers)) if type(cache) is DynamicCache else {}
    if layers and not step.is_continued and not torch.is_grad_enabled():
        for module, prefix in prefixes.items():
            if type(layers.get(module.layer_idx)) is DynamicLayer:
                layers[module.layer_idx] = cache.layers[module.layer_idx] = PrefixLayer(prefix, dtype)
    held = {m: layer for m in prefixes if layers and isinstance(layer := layers.get(m.layer_idx), PrefixLayer)}
    for module, layer in list(held.items())[:1]:  # one tells: looking at every layer would cost more than it is worth
        if not layer.holds(prefixes[module]):
            raise AdapterError("the cache was computed with another adapter: leave it out")
    return set(held)


def make_room(cache: Any, is_virtual: Tensor) -> None:
    """Let an empty cache take virtual tokens among the words, and keep them when the words leave a window.

    Args:
        cache: of a stack's words.
        is_virtual: [B, S] which of the first slots are virtual tokens'.

    Raises:
        UnsupportedModelError: a static cache holds no more than the windows.
    """
    sizes = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
        elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            if not sizes:
                raise UnsupportedModelError(
                    "virtual tokens among the words outlive a window, for which a static cache has no place: leave out "
                    "cache_implementation"
                )
            cache.layers[number] = StaticLayer(max(sizes) + int(is_virtual.sum(dim=1).max()))
    cache.softtune_virtual = is_virtual


def virtual_slots(cache: Any, slots: int, rows: int) -> Tensor:
    """[B, S] which slots of a cache, and of the step that goes on from it, are virtual tokens'."""
    is_virtual = multiplied(cache.softtune_virtual, rows)
    return F.pad(is_virtual, (0, slots - is_virtual.shape[1]))


def as_long_as(cache: Cache | None, mask: Tensor) -> Tensor:
    """[B, W] a mask filled up to the length of a static cache: Bloom makes linear biases of it for all keys."""
    sizes = (
        [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)] if cache is not None else []
    )
    return F.pad(mask, (0, sizes[0] - mask.shape[1])) if sizes else mask


def own_cache(stack: PreTrainedModel, call: Call) -> Cache | None:
    """The text's cache where the call has or wants one. Gradient checkpointing allows none."""
    cache: Cache | None = call.get("cache")
    if cache is not None:
        return cache
    uses_cache = call.get("use_cache")
    uses_cache = getattr(stack.config, "use_cache", True) if uses_cache is None else uses_cache
    return DynamicCache(config=stack.config) if uses_cache and not is_checkpointing(stack) else None


def prepend(prefix: Tensor, own: Tensor) -> Tensor:
    """[B, H, P, K] before [B, H, S, K]."""
    return torch.cat([prefix.to(own.dtype), own], dim=2)
