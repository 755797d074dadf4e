"""The flat layout of a prefix: one row [W] for each virtual token, with the keys and values of all layers side by side.

This is the layout of PEFT and its files: layer after layer, a layer's keys before its values, head after head. Letters:
P virtual tokens, H key/value heads, K key size, V value size, W = the sum of H·(K + V) over the chosen layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from softtune.backbone import AttentionLayer, Backbone, Place, Site
from softtune.errors import AdapterError, AdapterMismatchError, ConfigError, UnsupportedModelError
from softtune.methods.base import PromptLearningConfig
from softtune.methods.prompt import KeyValue, Prompt

Layers = list[int] | str | None


def choose_layers(backbone: Backbone, layers: Layers, sites: Sequence[Site] | None) -> list[AttentionLayer]:
    """The attention layers that a config selects, at every chosen site.

    Raises:
        UnsupportedModelError: the base model cannot take a prefix.
        ConfigError: the model has no such layer or site.
    """
    present = list(dict.fromkeys(a.site for a in backbone.attention_layers))
    if not present:
        raise UnsupportedModelError(
            f"{type(backbone.model).__name__} has no attention layer that can take a prefix",
            "use PromptTuningConfig, PromptEncoderConfig or BitFitConfig",
        )
    if sites is not None and (not sites or not set(sites) <= set(present) or len(set(sites)) < len(sites)):
        raise ConfigError(f"sites = {[s.value for s in sites]}", f"name different ones of {[s.value for s in present]}")
    chosen = []
    for site in sites or present:
        at_site = [a for a in backbone.attention_layers if a.site is site]
        chosen += [at_site[i] for i in _layer_numbers(layers, len(at_site))]
    if not backbone.takes_wrapper and len(chosen) < len(backbone.attention_layers):
        raise UnsupportedModelError(
            f"{type(backbone.model).__name__} takes a prefix at every layer or none", "drop layers"
        )
    return chosen


def check_wrapper(backbone: Backbone) -> None:
    """Check that terms can be added to the outputs of a model's attention layers.

    Raises:
        UnsupportedModelError: its layers do not call the attention interface.
    """
    if not backbone.takes_wrapper:
        raise UnsupportedModelError(
            f"nothing can be added to the attention of {type(backbone.model).__name__}, which calls no interface",
            "use PrefixTuningConfig",
        )


def _layer_numbers(layers: Layers, count: int) -> list[int]:
    every = list(range(count))
    if layers is None:
        return every
    if isinstance(layers, str):
        side, _, number = layers.partition(":")
        if side not in ("first", "last") or not number.isdigit() or not 1 <= int(number) <= count:
            raise ConfigError(f"layers = {layers!r}", f"write 'first:N' or 'last:N' with N from 1 to {count}")
        return every[: int(number)] if side == "first" else every[-int(number) :]
    if not layers or not set(layers) <= set(every) or len(set(layers)) != len(layers):
        raise ConfigError(f"layers = {layers}", f"name different layers from 0 to {count - 1}")
    return sorted(layers)


def settle_prefix(config: PromptLearningConfig, backbone: Backbone) -> None:
    """Fill in PEFT's size fields from the first layer of the last stack's self-attention.

    Where layers differ, PEFT's sizes may be those of another layer.
    """
    main = [a for a in backbone.attention_layers if a.site is backbone.stacks[-1].site] or backbone.attention_layers
    given = config.token_dim, config.num_attention_heads
    layer = next((a for a in main if (a.heads * a.key_size, a.heads) == given), main[0])
    config.settle(token_dim=layer.heads * layer.key_size, num_attention_heads=layer.heads, num_layers=len(main))
    config.num_transformer_submodules = config.num_transformer_submodules or len(backbone.stacks)


def is_even(backbone: Backbone) -> bool:
    """Whether all layers have keys and values of the same size in the model's KV cache, as PEFT assumes."""
    layers = backbone.attention_layers
    sizes = {(a.heads, size) for a in layers for size in (a.key_size, a.value_size)}
    depth = backbone.depth
    return len(sizes) == 1 and len(layers) == depth and all(a.is_cached for a in layers)


def from_peft_layout(
    prompt: Tensor, config: PromptLearningConfig, layers: Sequence[AttentionLayer]
) -> tuple[Tensor, list[AttentionLayer]]:
    """Convert a prefix from the layout of PEFT's files, which differs for encoder-decoders and for uneven layers.

    In an encoder-decoder, PEFT repeats the tensor's 2·L parts once, and layer l of the decoder's self-attention reads
    the parts 4l and 4l + 1. No other site gets a prefix. In a decoder such as Gemma 4, each layer reads as much of its
    parts as it has room for, and layers that would need more get no prefix.

    Args:
        prompt: [P, W] a prefix as PEFT saves it; one that cannot be for this base model is returned as it is.
        config: the sizes that PEFT reads it by.
        layers: the layers that should get it.

    Returns:
        The flat prefix, and the layers that it is for.

    Raises:
        AdapterMismatchError: the layers are not those of the decoder's self-attention.
    """
    assert config.num_layers
    assert config.num_attention_heads
    assert config.token_dim
    if config.num_transformer_submodules == 2:
        if any(layer.site is not Site.DECODER for layer in layers):
            raise AdapterMismatchError(
                "PEFT's prefix is for the decoder's own attention", "set sites=['decoder'] in the config"
            )
        return _of_decoder(prompt, config.num_layers), list(layers)
    heads, size = config.num_attention_heads, config.token_dim // config.num_attention_heads
    fitting = [layer for layer in layers if fits(layer, heads, size)]
    is_plain = len(layers) == config.num_layers and is_uniform(layers, heads, size)
    if is_plain or prompt.shape[1:] != (config.num_layers * 2 * heads * size,) or not fitting:
        return prompt, list(layers)
    return cut_out(prompt.view(len(prompt), config.num_layers, 2, heads, size), fitting), fitting


def _of_decoder(prompt: Tensor, num_layers: int) -> Tensor:
    """[P, W] of a decoder's self-attention from PEFT's prefix [P, W] of an encoder-decoder."""
    if prompt.dim() != 2 or prompt.shape[1] % (2 * num_layers):
        return prompt
    parts = prompt.view(len(prompt), 2 * num_layers, -1).repeat(1, 2, 1)
    return parts.view(len(prompt), num_layers, 4, -1)[:, :, :2].flatten(1)


def is_uniform(layers: Sequence[AttentionLayer], heads: int, size: int) -> bool:
    """Whether every layer has keys and values of its own, with so many heads of this size."""
    return all((a.heads, a.key_size, a.value_size) == (heads, size, size) and a.shared_from is None for a in layers)


def fits(layer: AttentionLayer, heads: int, size: int) -> bool:
    """Whether a layer has at most so many heads, of at most this size."""
    return layer.heads <= heads and max(layer.key_size, layer.value_size) <= size


def cut_out(even: Tensor, layers: Sequence[AttentionLayer]) -> Tensor:
    """Cut each layer's keys and values out of a prefix that has room for larger ones.

    A layer that attends to the keys and values of an earlier one sees that layer's prefix, as it does where a prefix
    comes as a cache.

    Args:
        even: [P, L, 2, heads, size] the keys and values of all layers.
        layers: the layers that get a prefix.

    Returns:
        The flat prefix [P, W] of these layers.
    """
    parts = []
    for layer in layers:
        source = layer.index if layer.shared_from is None else layer.shared_from
        for part, size in enumerate((layer.key_size, layer.value_size)):
            parts.append(even[:, source, part, : layer.heads, :size].flatten(1))
    return torch.cat(parts, dim=1)


def split_prefix(flat: Tensor, layers: Sequence[AttentionLayer]) -> dict[tuple[Site, int], KeyValue]:
    """Split a flat prefix [P, W] into each layer's key [H, P, K] and value [H, P, V]."""
    widths = [a.heads * size for a in layers for size in (a.key_size, a.value_size)]
    parts: Iterator[Tensor] = iter(flat.split(widths, dim=1))

    def heads(layer: AttentionLayer) -> Tensor:
        return next(parts).view(len(flat), layer.heads, -1).transpose(0, 1)

    return {(a.site, a.index): KeyValue(key=heads(a), value=heads(a)) for a in layers}


def joined_prefix(prefixes: Mapping[Place, KeyValue], layers: Sequence[AttentionLayer]) -> Tensor:
    """Join each layer's key [H, P, K] and value [H, P, V] into a flat prefix [P, W]."""
    parts = [part for layer in layers for part in prefixes[layer.place]]
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)


def flat_prefix(backbone: Backbone, layers: Sequence[AttentionLayer], input_ids: Tensor) -> Tensor:
    """[P, W] in fp32: the keys and values that the frozen model computes for token ids [P].

    The decoder of an encoder-decoder reads one token less; its first row is repeated at the end.

    Raises:
        UnsupportedModelError: a layer does not compute keys and values for every text.
    """
    computed = backbone.keys_and_values(input_ids)
    rows = torch.arange(len(input_ids))
    if missing := [a for a in layers if a.place not in computed]:
        raise UnsupportedModelError(
            f"layer {missing[0].index} of {type(backbone.model).__name__} attends to some texts alone",
            "set layers to others, or init_weights='random'",
        )
    parts = [part[:, rows % part.shape[1]] for a in layers for part in computed[a.site, a.index]]
    return torch.cat([part.transpose(0, 1).reshape(len(input_ids), -1) for part in parts], dim=1).float()


def composed(prompts: Sequence[Prompt]) -> Prompt:
    """Put the prefixes of several prompts one behind the other, in the given order, as one prompt.

    A key is as it was trained, after any rotary position embedding: each part keeps its own positions 0 .. P_i - 1, so
    that the parts overlap. The text starts at the sum of all P_i behind parts that shift its positions, and at 0 behind
    parts that do not. So the first part and the text are as far from each other as the other parts are long, which none
    of them was trained with. The order counts where attention adds distances to its scores (such as ALiBi and T5), and
    says nothing elsewhere.

    Raises:
        AdapterError: there is no prompt, or one has more than a prefix in front of the text.
        AdapterMismatchError: the prompts are for different layers or sizes of heads, or differ in whether the text's
            positions are shifted, or in how many virtual tokens training drops.
    """
    if not prompts:
        raise AdapterError("there is no prefix", "only prefixes in front of the text can stand one behind the other")
    for number, prompt in enumerate(prompts, 1):
        if found := _obstacle(prompt):
            raise AdapterError(
                f"{found} (adapter {number} of {len(prompts)})",
                "only prefixes in front of the text can stand one behind the other",
            )
    first = prompts[0]
    if len({p.token_dropout for p in prompts}) > 1:
        raise AdapterMismatchError("the prefixes differ in token dropout", "compose them in evaluation mode")
    if len({p.shifts_positions for p in prompts}) > 1 or any(_sizes(p) != _sizes(first) for p in prompts):
        raise AdapterMismatchError("the prefixes are for different layers or positions", "compose those of one kind")
    by_place = {place: [p.prefixes[place] for p in prompts] for place in first.prefixes}
    return Prompt(
        num_virtual_tokens=sum(p.num_virtual_tokens for p in prompts),
        prefixes={
            place: KeyValue(torch.cat([p.key for p in pairs], dim=1), torch.cat([p.value for p in pairs], dim=1))
            for place, pairs in by_place.items()
        },
        shifts_positions=first.shifts_positions,
        token_dropout=first.token_dropout,
    )


def _obstacle(prompt: Prompt) -> str | None:
    """What a prompt has that no other prefix can stand before or behind; None where it is a plain prefix."""
    if prompt.additions:
        return "it has trained biases"
    if prompt.scalings:
        return "it has trained factors"
    if prompt.terms:
        return "it adds to what attention returns"
    if prompt.after_text:
        return "its virtual tokens are behind the text"
    if prompt.vectors is not None:
        return "its virtual tokens are at the input"
    return None if prompt.prefixes else "it has no keys and values"


def _sizes(prompt: Prompt) -> dict[Place, tuple[int, int, int]]:
    """H, K and V of each layer's prefix."""
    return {place: (len(p.key), p.key.shape[2], p.value.shape[2]) for place, p in prompt.prefixes.items()}
