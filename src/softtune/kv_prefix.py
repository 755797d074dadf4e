"""PEFT's functions that initialize a prefix, be it a cartridge's, from a text's KV cache.

Letters: H key/value heads, T tokens, P virtual tokens, K size of a key, W values of one virtual token over all layers.

Internal: import from ``softtune``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune import compat
from softtune.backbone import evaluating
from softtune.errors import AdapterError, DataError
from softtune.methods import CartridgeEncoder, PrefixEncoder
from softtune.model import PeftModel


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """[P, W] the first P keys and values of a text's KV cache, in the layout of a saved prefix.

    Args:
        past_key_values: a cache of one row, or a key [1, H, T, K] and a value for each layer.
        num_virtual_tokens: P.

    Raises:
        DataError: the cache is empty, has fewer tokens or several rows, has lost its first tokens, or does not consist
            of keys and values.
    """
    layers = getattr(past_key_values, "layers", past_key_values)
    pairs = [layer if isinstance(layer, (tuple, list)) else (layer.keys, layer.values) for layer in layers]
    parts = [part for pair in pairs for part in pair[:2]]
    counted = [layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")]
    if any(count != pair[0].shape[2] for count, pair in zip(counted, pairs, strict=False)):
        raise DataError("past_key_values has lost its first tokens, or room for more", "give a cache of as few tokens")
    if not parts or any(not isinstance(part, Tensor) or part.dim() != 4 for part in parts):
        raise DataError(
            "past_key_values holds no keys and values by layer", "give what a forward with a cache returned"
        )
    rows, tokens = {len(part) for part in parts}, min(part.shape[2] for part in parts)
    if rows != {1} or tokens < num_virtual_tokens:
        raise DataError(
            f"past_key_values has {max(rows)} rows of {tokens} tokens", f"give one row of at least {num_virtual_tokens}"
        )
    return torch.cat([part[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for part in parts], dim=1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Initialize a prefix from a text's KV cache, and return it as [P, W].

    Args:
        model: the model with the adapter.
        adapter_name: the adapter's name; by default that of the active one.
        past_key_values: see ``prompt_embeddings_from_past_key_values``.
        num_virtual_tokens: P, by default the adapter's.

    Raises:
        AdapterError: no such adapter, or it is no plain prefix: it has a projection, or virtual tokens at the input.
        DataError: the cache does not fit.
    """
    module = _prefix(model, adapter_name)
    shape = module().shape
    flat = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=num_virtual_tokens or shape[0])
    if flat.shape != shape:
        raise DataError(
            f"past_key_values gives {list(flat.shape)} numbers, the prefix has {list(shape)}",
            "take the base model's own cache, and as many tokens",
        )
    module.start_from(flat)
    return flat


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Initialize a prefix from the keys and values that the base model computes for a text, and return it as [P, W].

    Args:
        model: the model with the adapter.
        tokenizer: the base model's tokenizer.
        text: a text of at least P tokens, of which the first P are used.
        adapter_name: see ``initialize_kv_prefix_from_past_key_values``; so is ``num_virtual_tokens``.
        num_virtual_tokens: P, by default the adapter's.
        use_chat_template: format the text as a system message if the tokenizer has a chat template.
        max_length: use at most this many tokens.

    Raises:
        AdapterError: no such adapter, or it is no plain prefix.
        DataError: the text is too short.
    """
    size = len(_prefix(model, adapter_name)())
    has_template = bool(use_chat_template and tokenizer.chat_template)
    if has_template:
        text = str(tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not has_template)["input_ids"][:, :max_length]
    ids = ids[:, : num_virtual_tokens or size]  # causal attention: later tokens change nothing
    with model.disable_adapter(), evaluating(model):
        cache = compat.cache_of(model(input_ids=ids.to(model.device), use_cache=True))
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _prefix(model: PeftModel, adapter_name: str | None) -> PrefixEncoder | CartridgeEncoder:
    """The module of an adapter that is a plain prefix.

    Raises:
        AdapterError: no such adapter, or it is no plain prefix.
    """
    name = adapter_name or model.active_adapter
    adapter = model.adapter(name)
    module = adapter.module
    if isinstance(module, CartridgeEncoder) or (isinstance(module, PrefixEncoder) and module.transform is None):
        return module
    raise AdapterError(
        f"{name!r} is no plain prefix", "use CartridgeConfig, or PrefixTuningConfig without prefix_projection"
    )
