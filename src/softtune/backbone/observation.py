"""What forwards of a few tokens show of a base model: its attention layers, and what its modules return.

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
from softtune.backbone.outputs import TOKENS, Outputs, observing
from softtune.backbone.refusal import reading_text
from softtune.backbone.stack import AttentionLayer, Site, Stack, device_of


@dataclass(frozen=True)
class Seen:
    """What an attention layer held for one text."""

    layer: AttentionLayer
    key: Tensor
    """[H, T, K]"""
    value: Tensor
    """[H, T, V]"""


def seen_attention(model: PreTrainedModel, stacks: Sequence[Stack], **inputs: Tensor) -> list[Seen]:
    """Every attention layer that can take a prefix, by site and depth, in a forward of one text [1, T].

    Args:
        model: the base model, in the mode that it is to run in.
        stacks: its stacks.
        inputs: ``input_ids`` or ``inputs_embeds``. An encoder-decoder's decoder reads the same text, less its last
            token.
    """
    recorder = AttentionRecorder()
    passing = _passing(recorder, stacks) if compat.has_interface(model) else _wrapping(recorder, stacks)
    with reading_text(model, lambda: _run(model, stacks, inputs)), passing:
        output = _run(model, stacks, inputs, **{"use_cache": True} if _is_decoder(stacks) else {})
    cache = compat.cache_of(output) if _is_decoder(stacks) else None
    seen = _recorded(recorder, stacks, cache) if recorder.calls else _cached(cache)
    return sorted(seen, key=lambda s: list(Site).index(s.layer.site))


def seen_outputs(model: PreTrainedModel, stacks: Sequence[Stack]) -> Outputs:
    """What all modules of the base model return for two rows of seven tokens."""
    embeddings = [stack.module.get_input_embeddings() for stack in stacks]
    ids = stacks[0].some_ids(2 * TOKENS).view(2, TOKENS)
    with (
        reading_text(model, lambda: _run(model, stacks, {"input_ids": ids})),
        observing(model, embeddings) as outputs,
    ):
        _run(model, stacks, {"input_ids": ids})
    return outputs


def _is_decoder(stacks: Sequence[Stack]) -> bool:
    return [stack.site for stack in stacks] == [Site.DECODER]


@contextmanager
def _passing(wrapper: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """Hand ``wrapper`` to every attention layer for the length of the block."""

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
    """The same for attention that calls no interface: DeBERTa's."""
    with ExitStack() as block:
        for stack in stacks:
            block.enter_context(wrap_disentangled_attention(stack.module, wrapper))
        yield


def _run(model: PreTrainedModel, stacks: Sequence[Stack], inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """A forward below the head, and below what puts pictures among the words."""
    inputs = {name: tensor.to(device_of(model)) for name, tensor in inputs.items()}
    if len(stacks) == 1:
        return stacks[0].module(**inputs, **kwargs)
    ids = inputs["input_ids"]
    return model.base_model(**inputs, decoder_input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids.repeat(1, 2))


def _recorded(recorder: AttentionRecorder, stacks: Sequence[Stack], cache: Any) -> list[Seen]:
    """The layers that called the attention interface."""
    own = {module: stack.site for stack in stacks for module in stack.module.modules()}
    # ALBERT calls one module for every layer: its layers share a prefix.
    calls = {call[0]: call for call in reversed(recorder.calls)}
    count: Counter[Site] = Counter()
    seen = []
    for module, key, value, other in reversed(calls.values()):
        site = Site.CROSS if other and own[module] is Site.DECODER else own[module]
        facts = _facts(module, key, value, recorder, cache)
        seen.append(_seen(key[0], value[0], site=site, index=count[site], module=module, **facts))
        count[site] += 1
    return seen


def _cached(cache: Any) -> list[Seen]:
    """The layers of a decoder that takes a prefix as a ready cache alone."""
    layers = getattr(cache, "layers", [])
    if any(getattr(layer, "keys", None) is None for layer in layers):  # states, as Mamba has
        return []
    return [_seen(x.keys[0], x.values[0], site=Site.DECODER, index=i) for i, x in enumerate(layers)]


def _seen(key: Tensor, value: Tensor, **facts: Any) -> Seen:
    sizes: dict[str, Any] = {"heads": key.shape[0], "key_size": key.shape[-1], "value_size": value.shape[-1]}
    return Seen(AttentionLayer(**sizes, **facts), key, value)


def _facts(module: nn.Module, key: Tensor, value: Tensor, recorder: AttentionRecorder, cache: Any) -> dict[str, Any]:
    """Whether a layer's keys [1, H, T, K] and values are shared and cached."""
    shared = {call[0] for call in recorder.calls if call[1].data_ptr() == key.data_ptr()} != {module}
    if cache is None:
        return {"is_shared": shared}
    index = module.layer_idx
    held = cache.layers[index] if isinstance(index, int) and index < len(cache.layers) else None
    # DiffLlama attends to halves of the values that are cached.
    are_held = held is not None and _same(held.keys, key) and _same(held.values, value)
    return {"is_shared": shared, "is_cached": are_held and not shared}


def _same(held: Tensor | None, given: Tensor) -> bool:
    return held is not None and held.shape == given.shape and (held.is_meta or torch.equal(held, given))
