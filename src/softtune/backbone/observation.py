"""Observes the attention layers of a base model and the outputs of its modules, in forwards of a few tokens.

Letters: H key/value heads, T tokens, K and V sizes of a key and a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import compat
from softtune.backbone.disentangled import wrap_disentangled_attention
from softtune.backbone.interface import WRAPPER, AttentionRecorder
from softtune.backbone.outputs import TOKENS, Observed, observing
from softtune.backbone.refusal import reading_text
from softtune.backbone.stack import AttentionLayer, Place, Site, Stack, device_of


@dataclass(frozen=True)
class Seen:
    """An attention layer with its keys and values for one text."""

    layer: AttentionLayer
    key: Tensor
    """[H, T, K]"""
    value: Tensor
    """[H, T, V]"""


def keys_and_values(
    model: PreTrainedModel, stacks: Sequence[Stack], **inputs: Tensor
) -> dict[Place, tuple[Tensor, Tensor]]:
    """Compute the keys [H, T, K] and values [H, T, V] of a text [1, T] in every attention layer that can take a prefix.

    Looks at no numbers, so that no device is waited for. For the arguments see ``seen_attention``.
    """
    recorder, output = _observe(model, stacks, inputs)
    if recorder.calls:
        calls = _by_place(recorder, stacks)
        return {place: (key[0], value[0]) for place, (_, key, value, _) in calls.items()}
    return {seen.layer.place: (seen.key, seen.value) for seen in _cached(compat.cache_of(output))}


def seen_attention(model: PreTrainedModel, stacks: Sequence[Stack], **inputs: Tensor) -> list[Seen]:
    """Observe every attention layer that can take a prefix, ordered by site and depth, in a forward of a text [1, T].

    Args:
        model: the base model, in the mode in which it is to run.
        stacks: its stacks.
        inputs: ``input_ids`` or ``inputs_embeds``. An encoder-decoder's decoder reads the same text, less its last
            token.
    """
    recorder, output = _observe(model, stacks, inputs)
    cache = compat.cache_of(output) if _is_decoder(stacks) else None
    seen = _recorded(recorder, stacks, cache) if recorder.calls else _cached(cache)
    return sorted(seen, key=lambda s: list(Site).index(s.layer.site))


def _observe(
    model: PreTrainedModel, stacks: Sequence[Stack], inputs: dict[str, Tensor]
) -> tuple[AttentionRecorder, Any]:
    """Run a forward, and record the calls of the attention interface in it."""
    recorder = AttentionRecorder()
    passing = _passing(recorder, stacks) if compat.has_interface(model) else _wrapping(recorder, stacks)
    with reading_text(model, lambda: _run(model, stacks, inputs)), passing:
        return recorder, _run(model, stacks, inputs, **{"use_cache": True} if _is_decoder(stacks) else {})


def seen_outputs(model: PreTrainedModel, stacks: Sequence[Stack]) -> Observed:
    """Observe the outputs and inputs of all modules of the base model for two rows of seven tokens."""
    embeddings = [stack.module.get_input_embeddings() for stack in stacks]
    ids = stacks[0].some_ids(2 * TOKENS).view(2, TOKENS)
    with (
        reading_text(model, lambda: _run(model, stacks, {"input_ids": ids})),
        observing(model, embeddings) as observed,
    ):
        _run(model, stacks, {"input_ids": ids})
    return observed


def _is_decoder(stacks: Sequence[Stack]) -> bool:
    return [stack.site for stack in stacks] == [Site.DECODER]


@contextmanager
def _passing(wrapper: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """Pass ``wrapper`` to every attention layer for the length of the block."""

    def add_wrapper(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, WRAPPER: wrapper}

    handles = [s.module.register_forward_pre_hook(add_wrapper, with_kwargs=True) for s in stacks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _wrapping(wrapper: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """The same for DeBERTa's attention, which does not call the attention interface."""
    with ExitStack() as block:
        for stack in stacks:
            block.enter_context(wrap_disentangled_attention(stack.module, wrapper))
        yield


def _run(model: PreTrainedModel, stacks: Sequence[Stack], inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """Run a forward without the head, and without the model that inserts image features into the input."""
    inputs = {name: tensor.to(device_of(model)) for name, tensor in inputs.items()}
    if len(stacks) == 1:
        return stacks[0].module(**inputs, **kwargs)
    ids = inputs["input_ids"]
    return model.base_model(**inputs, decoder_input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids.repeat(1, 2))


def _recorded(recorder: AttentionRecorder, stacks: Sequence[Stack], cache: Any) -> list[Seen]:
    """The layers that called the attention interface."""
    first: dict[int, int] = {}
    seen = []
    for (site, index), (module, key, value, query_heads) in _by_place(recorder, stacks).items():
        facts = _facts(module, key, value, recorder, cache) | {"query_heads": query_heads}
        if facts["is_shared"]:
            source = first.setdefault(key.data_ptr(), index)
            facts["shared_from"] = None if source == index else source
        seen.append(_seen(key[0], value[0], site=site, index=index, module=module, **facts))
    return seen


def _by_place(
    recorder: AttentionRecorder, stacks: Sequence[Stack]
) -> dict[Place, tuple[nn.Module, Tensor, Tensor, int]]:
    """Each layer's module, keys [1, H, T, K], values and number of query heads, in the order of the calls."""
    sites = {module: stack.site for stack in stacks for module in stack.module.modules()}
    # ALBERT calls one module for every layer: its layers share a prefix.
    calls = {call[0]: call for call in reversed(recorder.calls)}
    count: Counter[Site] = Counter()
    found = {}
    for module, key, value, other, query_heads in reversed(calls.values()):
        site = Site.CROSS if other and sites[module] is Site.DECODER else sites[module]
        found[site, count[site]] = (module, key, value, query_heads)
        count[site] += 1
    return found


def _cached(cache: Any) -> list[Seen]:
    """The layers of a decoder that takes a prefix only as a cache."""
    layers = getattr(cache, "layers", [])
    if any(getattr(layer, "keys", None) is None for layer in layers):  # recurrent states, as in Mamba
        return []
    return [_seen(x.keys[0], x.values[0], site=Site.DECODER, index=i) for i, x in enumerate(layers)]


def _seen(key: Tensor, value: Tensor, **facts: Any) -> Seen:
    sizes: dict[str, Any] = {"heads": key.shape[0], "key_size": key.shape[-1], "value_size": value.shape[-1]}
    return Seen(AttentionLayer(**sizes, **facts), key, value)


def _facts(module: nn.Module, key: Tensor, value: Tensor, recorder: AttentionRecorder, cache: Any) -> dict[str, Any]:
    """Whether a layer's keys [1, H, T, K] and values are shared with other layers, and whether the cache holds them."""
    shared = {call[0] for call in recorder.calls if call[1].data_ptr() == key.data_ptr()} != {module}
    if cache is None:
        return {"is_shared": shared}
    index = module.layer_idx
    cached = cache.layers[index] if isinstance(index, int) and index < len(cache.layers) else None
    # DiffLlama attends to halves of the values that are cached.
    are_cached = cached is not None and _same(cached.keys, key) and _same(cached.values, value)
    return {"is_shared": shared, "is_cached": are_cached and not shared}


def _same(cached: Tensor | None, given: Tensor) -> bool:
    return cached is not None and cached.shape == given.shape and (cached.is_meta or torch.equal(cached, given))
