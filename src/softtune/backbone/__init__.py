"""The only reader of Hugging Face internals: stacks, attention layers and their sizes, embeddings, heads, positions.

Sizes are observed, not derived from configs: a forward of three tokens shows every attention layer's keys and values,
so grouped heads, uneven layers and layers without attention need no rule of their own. Knows nothing about adapters.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from softtune.backbone.interface import WRAPPER, AttentionRecorder, install
from softtune.backbone.roles import BiasSlot, bias_slots
from softtune.errors import UnsupportedModelError


class Site(str, Enum):
    """Where a prefix attaches."""

    ENCODER = "encoder"
    DECODER = "decoder"
    CROSS = "cross"


Place = tuple[Site, int]
"""An attention layer's site, and its number within the site."""


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention layer that can take a prefix, and the sizes of its keys and values."""

    site: Site
    index: int
    """The layer's number within its site, from 0."""
    heads: int
    """H, the number of key/value heads."""
    key_size: int
    value_size: int
    module: nn.Module | None = None
    """The module that calls the attention interface; None in models that only take a ready cache."""

    @property
    def place(self) -> Place:
        return self.site, self.index

    @property
    def width(self) -> int:
        """Numbers that one virtual token has in this layer: keys and values together."""
        return self.heads * (self.key_size + self.value_size)


class Stack:
    """One run of transformer layers with its own embeddings: an encoder or a decoder."""

    def __init__(self, module: PreTrainedModel, site: Site) -> None:
        self.module = module
        self.site = site
        self.signature = inspect.signature(module.forward)

    @property
    def is_causal(self) -> bool:
        return self.site is Site.DECODER

    @property
    def takes_position_ids(self) -> bool:
        return "position_ids" in self.signature.parameters

    @cached_property
    def position_table(self) -> nn.Module | None:
        """The position embedding of BART's kin, which counts for itself and takes an offset."""
        return None if self.takes_position_ids else getattr(self.module, "embed_positions", None)

    @cached_property
    def first_position(self) -> int:
        """The first real token's position: RoBERTa's kin begin behind their padding's."""
        embeddings: Any = getattr(self.module, "embeddings", None)
        counts_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
        return int(embeddings.padding_idx) + 1 if counts_padding else 0

    @cached_property
    def table_size(self) -> int | None:
        """Positions that the stack has a table for; None where they are rotary, relative or linear biases."""
        limit = getattr(self.module.config, "max_position_embeddings", None)
        tables = [
            m for n, m in self.module.named_modules() if n.endswith(("position_embeddings", "wpe", "embed_positions"))
        ]
        return limit if any(isinstance(t, nn.Embedding) for t in tables) else None

    @cached_property
    def relative_bias(self) -> nn.Module | None:
        """T5's attention module that owns the relative position bias of the whole stack."""
        return next((m for m in self.module.modules() if getattr(m, "has_relative_attention_bias", False)), None)

    def prefix_bias(self, positions: Tensor, length: int) -> Tensor:
        """[B, heads, T, P] T5's bias of queries at positions [B, T] for a prefix that stands right before position
        0."""
        owner: Any = self.relative_bias
        distance = torch.arange(-length, 0, device=positions.device) - positions[..., None]
        buckets = owner._relative_position_bucket(
            distance,
            bidirectional=not self.is_causal,
            num_buckets=owner.relative_attention_num_buckets,
            max_distance=owner.relative_attention_max_distance,
        )
        bias: Tensor = owner.relative_attention_bias(buckets)
        return bias.permute(0, 3, 1, 2)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word vectors [B, T, D] as the first layer sees them, scaled where the model scales them."""
        embedded: Tensor = self.module.get_input_embeddings()(input_ids)
        return embedded

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call to the stack by name."""
        bound = self.signature.bind(*args, **kwargs).arguments
        rest = bound.pop("kwargs", {})
        return {**bound, **rest}


class Backbone:
    """A base model as softtune sees it. The model's tensors are neither copied nor changed.

    Args:
        model: a Hugging Face transformer, with or without a head.

    Raises:
        UnsupportedModelError: the model is no ``PreTrainedModel``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no Hugging Face transformer: load the model by from_pretrained"
            )
        self.model = model
        if model.config.is_encoder_decoder:
            self.stacks = [Stack(model.get_encoder(), Site.ENCODER), Stack(model.get_decoder(), Site.DECODER)]
        else:
            stack = model.get_decoder()
            self.stacks = [Stack(stack, Site.DECODER if _is_causal(stack) else Site.ENCODER)]
        self.has_interface = model._can_set_attn_implementation()
        if self.has_interface:
            install(model)

    @property
    def is_encoder_decoder(self) -> bool:
        return len(self.stacks) == 2

    @property
    def is_decoder_only(self) -> bool:
        return [s.site for s in self.stacks] == [Site.DECODER]

    @property
    def continues_text(self) -> bool:
        """Whether labels are tokens of the input: a decoder with a language head."""
        return self.is_decoder_only and self.model.get_output_embeddings() is not None

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding of the stack that reads the input."""
        embedding = self.stacks[0].module.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model is made for; None where its config names none."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @cached_property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every attention layer that can take a prefix, by site and depth; empty where none can."""
        with self._evaluating():
            return [layer for layer, _, _ in self._observe(input_ids=torch.zeros(1, 3, dtype=torch.long))]

    def keys_and_values(self, input_ids: Tensor) -> dict[tuple[Site, int], tuple[Tensor, Tensor]]:
        """What the frozen attention layers hold for one text: keys [H, T, K] and values [H, T, V] by site and layer.

        Args:
            input_ids: [T]. An encoder-decoder's decoder reads the same text, less its last token.
        """
        with self._evaluating():
            return {layer.place: (key, value) for layer, key, value in self._observe(input_ids=input_ids[None])}

    @cached_property
    def runs_ahead(self) -> bool:
        """Whether keys and values are all that a text's later tokens take from its first ones: a decoder whose every
        layer attends."""
        return self.is_decoder_only and len(self.attention_layers) == self.text_config.num_hidden_layers

    def run_ahead(self, vectors: Tensor) -> dict[Place, tuple[Tensor, Tensor]]:
        """Keys [H, P, K] and values of virtual tokens [P, D] in front of a text, with gradients.

        The mode is the model's own; no layer is checkpointed, since nothing would recompute what is kept here.
        """
        checkpointed: list[Any] = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in checkpointed:
            module.gradient_checkpointing = False
        try:
            observed = self._observe(inputs_embeds=vectors[None].to(self.model.dtype))
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True
        return {layer.place: (key, value) for layer, key, value in observed}

    def _observe(self, **inputs: Tensor) -> list[tuple[AttentionLayer, Tensor, Tensor]]:
        observed = []
        count: Counter[Site] = Counter()
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        for site, module, key, value in self._attention_calls(inputs):
            sizes = {"heads": key.shape[0], "key_size": key.shape[-1], "value_size": value.shape[-1]}
            observed.append((AttentionLayer(site=site, index=count[site], module=module, **sizes), key, value))
            count[site] += 1
        return sorted(observed, key=lambda o: list(Site).index(o[0].site))

    def _attention_calls(self, inputs: dict[str, Tensor]) -> list[tuple[Site, nn.Module | None, Tensor, Tensor]]:
        if not self.has_interface:
            cache = self._run(inputs, use_cache=True).past_key_values if self.is_decoder_only else None
            return [(Site.DECODER, None, c.keys[0], c.values[0]) for c in (cache.layers if cache else [])]
        recorder = AttentionRecorder()
        with self._passing(recorder):
            self._run(inputs, use_cache=False)
        own = {m: s.site for s in self.stacks for m in s.module.modules()}
        # ALBERT calls one module for every layer: its layers share a prefix.
        calls = {call[0]: call for call in reversed(recorder.calls)}
        return [
            (Site.CROSS if other and own[module] is Site.DECODER else own[module], module, key[0], value[0])
            for module, key, value, other in reversed(calls.values())
        ]

    @contextmanager
    def _passing(self, wrapper: Any) -> Iterator[None]:
        """Hand ``wrapper`` to every attention layer for the length of the block."""

        def add_wrapper(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, WRAPPER: wrapper}

        handles = [s.module.register_forward_pre_hook(add_wrapper, with_kwargs=True) for s in self.stacks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, inputs: dict[str, Tensor], *, use_cache: bool) -> Any:
        """A forward below the head."""
        options: dict[str, Any] = {"use_cache": use_cache} if self.stacks[-1].is_causal else {}
        if self.is_encoder_decoder:
            ids = inputs["input_ids"]
            options["decoder_input_ids"] = ids[:, :-1] if ids.shape[1] > 1 else ids.repeat(1, 2)
        return self.model.base_model(**inputs, **options)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, for the length of the block."""
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    @property
    def head_names(self) -> list[str]:
        """Names of the modules that the task's class adds to the base model: a classifier, a span head; no language
        head."""
        base, words = self.model.base_model, self.model.get_output_embeddings()
        if base is self.model:
            return []
        children = [(name, set(child.modules()), child) for name, child in self.model.named_children()]
        return [n for n, own, child in children if child is not base and words not in own and [*child.parameters()]]

    def bias_slots(self) -> list[BiasSlot]:
        """Every place in the model below its head where a bias is, or could be added."""
        prefix = self.model.base_model_prefix
        prefix = f"{prefix}." if hasattr(self.model, prefix) else ""
        heads = set(self.head_names)
        slots = bias_slots(self.model, prefix, self.text_config.num_attention_heads)
        return [slot for slot in slots if slot.module.split(".")[0] not in heads]

    def embedding_sample(self, size: int = 16) -> list[float]:
        """A few numbers of the word embedding, by which an adapter knows its base model again at any precision."""
        weights = self.embedding.weight.detach().flatten()
        picks = torch.linspace(0, weights.numel() - 1, size + 2, dtype=torch.float64).long()[1:-1]
        return [round(float(x), 6) for x in weights[picks.to(weights.device)]]


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model or stack runs its layers again during the backward pass."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return model.training and any(layer.gradient_checkpointing for layer in layers)


def _is_causal(stack: PreTrainedModel) -> bool:
    flags = [m.is_causal for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else "past_key_values" in inspect.signature(stack.forward).parameters
