"""The only reader of Hugging Face internals: stacks, attention layers and their sizes, embeddings, heads, positions.

Sizes are observed, not derived from configs: a forward of three tokens shows every attention layer's keys and values,
so grouped heads, uneven layers and layers without attention need no rule of their own. Knows nothing about adapters.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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

_CACHES = {"past_key_values", "cache_params"}
"""The names that a stack gives to its cache; a model without attention has states in place of keys and values."""


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

    is_cached: bool = True
    """Whether the model's cache holds these keys and values for this layer alone: not a latent of theirs, nor those
    of layers that share them."""

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
        if hasattr(self.module, "build_mpt_alibi_tensor"):  # MPT has linear biases, but of a fixed length
            return int(self.module.config.max_seq_len)
        limit = getattr(self.module.config, "max_position_embeddings", None)
        modules = [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.Embedding)]
        names = [n for n, _ in (*modules, *self.module.named_buffers())]  # GPT-J keeps its sines in a buffer
        has_table = any(n.endswith(("position_embeddings", "wpe", "embed_positions")) for n in names)
        return limit - self.first_position if limit and has_table else None

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

    @cached_property
    def word_scale(self) -> float | None:
        """What the stack multiplies words with that it looks up by itself, but not vectors that come in their place:
        Marian's and Pegasus' encoders do. None where no vector can take a word's place."""
        word = (self.module.config.pad_token_id or 0) + 1  # padding has a position of its own in RoBERTa
        ids = torch.full((1, 3), word, device=self.module.device)
        words = self.module.get_input_embeddings()(ids)
        try:
            self._states(inputs_embeds=words + 1)
        except RuntimeError:  # Gemma 4 looks for the ids of all vectors
            return None
        expected = self._states(input_ids=ids)
        scales = (1.0, float(getattr(self.module, "embed_scale", 1.0)))
        fits = (s for s in scales if torch.allclose(self._states(inputs_embeds=words * s), expected, atol=1e-3))
        return next(fits, None)

    def _states(self, **inputs: Tensor) -> Tensor:
        with evaluating(self.module):
            # Not the module itself, whose hooks would see one more call.
            states: Tensor = self.module.forward(**inputs).last_hidden_state
            return states

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word vectors [B, T, D] as the first layer sees them, scaled where the model scales them."""
        embedded: Tensor = self.module.get_input_embeddings()(input_ids)
        return embedded * (self.word_scale or 1.0)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call to the stack by name."""
        bound = self.signature.bind(*args, **kwargs).arguments
        rest = bound.pop("kwargs", {})
        return {**bound, **rest}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients, for the length of the block."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def cached_length(call: Mapping[str, Any]) -> tuple[int, bool]:
    """How many tokens the cache of a call to a stack counts, and whether there is any text before the call's.

    A cache of states alone counts none.
    """
    cache: Any = next((call[name] for name in _CACHES if call.get(name) is not None), None)
    if cache is None:
        return 0, False
    try:
        length = int(cache.get_seq_length())
    except ValueError:
        return 0, bool(cache.has_previous_state())
    return length, length > 0


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
            encoder, decoder = _below_head(model.get_encoder()), _below_head(model.get_decoder())
            self.stacks = [Stack(encoder, Site.ENCODER), Stack(decoder, Site.DECODER)]
        else:
            decoder = model.get_decoder()  # of masked words a matrix may have that name
            stack = _below_head(decoder if isinstance(decoder, PreTrainedModel) else model)
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
    def judges_whole_texts(self) -> bool:
        """Whether a head above an encoder reads its first output, as classifiers of whole texts do."""
        whole = type(self.model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
        whole = whole and getattr(self.model.config, "classifier_pooling", "cls") == "cls"  # ModernBERT's choice
        return whole and self.stacks[0].site is Site.ENCODER and not self.is_encoder_decoder

    @property
    def takes_vectors(self) -> bool:
        """Whether vectors can stand among the words."""
        return self.stacks[0].word_scale is not None

    @property
    def has_plain_words(self) -> bool:
        """Whether the layers see words as the embedding has them."""
        return self.stacks[0].word_scale == 1.0

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
        with evaluating(self.model):
            return [layer for layer, _, _ in self._observe(input_ids=torch.zeros(1, 3, dtype=torch.long))]

    def keys_and_values(self, input_ids: Tensor) -> dict[tuple[Site, int], tuple[Tensor, Tensor]]:
        """What the frozen attention layers hold for one text: keys [H, T, K] and values [H, T, V] by site and layer.

        Args:
            input_ids: [T]. An encoder-decoder's decoder reads the same text, less its last token.
        """
        with evaluating(self.model):
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
        for site, module, key, value, is_cached in self._attention_calls(inputs):
            sizes = {"heads": key.shape[0], "key_size": key.shape[-1], "value_size": value.shape[-1]}
            layer = AttentionLayer(site=site, index=count[site], module=module, is_cached=is_cached, **sizes)
            observed.append((layer, key, value))
            count[site] += 1
        return sorted(observed, key=lambda o: list(Site).index(o[0].site))

    def _attention_calls(self, inputs: dict[str, Tensor]) -> list[tuple[Site, nn.Module | None, Tensor, Tensor, bool]]:
        """Site, module, key [H, T, K], value [H, T, V] of every layer, and whether the cache is as large."""
        recorder = AttentionRecorder()
        with self._passing(recorder) if self.has_interface else nullcontext():
            output = self._run(inputs, **{"use_cache": True} if self.is_decoder_only else {})
        cache = getattr(output, "past_key_values", None) if self.is_decoder_only else None
        if not self.has_interface:
            layers = [] if cache is None else cache.layers
            return [(Site.DECODER, None, layer.keys[0], layer.values[0], True) for layer in layers]
        own = {m: s.site for s in self.stacks for m in s.module.modules()}
        # ALBERT calls one module for every layer: its layers share a prefix.
        calls = {call[0]: call for call in reversed(recorder.calls)}
        return [
            (
                Site.CROSS if other and own[module] is Site.DECODER else own[module],
                module,
                key[0],
                value[0],
                cache is None or _is_cached(module, key, recorder, cache),
            )
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

    def _run(self, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        """A forward below the head."""
        if self.is_encoder_decoder:
            ids = inputs["input_ids"]
            kwargs["decoder_input_ids"] = ids[:, :-1] if ids.shape[1] > 1 else ids.repeat(1, 2)
        return self.model.base_model(**inputs, **kwargs)

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
        slots = [s for s in bias_slots(self.model, prefix) if s.module.split(".")[0] not in heads]
        if self.is_encoder_decoder:  # a decoder does not read what a BERT before it pools
            slots = [s for s in slots if ".pooler." not in s.module]
        return self._that_fit(slots)

    def _that_fit(self, slots: list[BiasSlot]) -> list[BiasSlot]:
        """Less the modules that cannot take a change at their output: those that return no row of features for each
        token, and those that the module around them reads the weights of instead of calling them."""
        outputs: dict[nn.Module, Any] = {}
        modules = {m for s in slots for m in (self._module(s), self._module(s, parent=True))}
        handles = [m.register_forward_hook(lambda m, args, output: outputs.update({m: output})) for m in modules]
        try:
            with evaluating(self.model):
                self._run({"input_ids": torch.zeros(1, 3, dtype=torch.long, device=self.model.device)})
        finally:
            for handle in handles:
                handle.remove()

        def fits(slot: BiasSlot) -> bool:
            module = self._module(slot)
            if module not in outputs:
                return self._module(slot, parent=True) not in outputs
            output = outputs[module]
            return isinstance(output, Tensor) and (slot.index is not None or output.shape[-1] == slot.width)

        return [slot for slot in slots if fits(slot)]

    def _module(self, slot: BiasSlot, parent: bool = False) -> nn.Module:
        return self.model.get_submodule(slot.module.rpartition(".")[0] if parent else slot.module)

    def embedding_sample(self, size: int = 16) -> list[float]:
        """A few numbers of the word embedding, by which an adapter knows its base model again at any precision."""
        weights = self.embedding.weight.detach().flatten()
        picks = torch.linspace(0, weights.numel() - 1, size + 2, dtype=torch.float64).long()[1:-1]
        return [round(float(x), 6) for x in weights[picks.to(weights.device)]]


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model or stack runs its layers again during the backward pass."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return model.training and any(layer.gradient_checkpointing for layer in layers)


def _is_cached(module: nn.Module, key: Tensor, recorder: AttentionRecorder, cache: Any) -> bool:
    index = module.layer_idx
    held = cache.layers[index].keys if isinstance(index, int) and index < len(cache.layers) else None
    users = {call[0] for call in recorder.calls if call[1].data_ptr() == key.data_ptr()}
    return held is not None and held.shape == key.shape and users == {module}


def _below_head(stack: PreTrainedModel) -> PreTrainedModel:
    """The layers alone: an ``EncoderDecoderModel`` is made of models with heads of their own."""
    base: Any = stack.base_model
    return stack if base is stack else _below_head(base)


def _is_causal(stack: PreTrainedModel) -> bool:
    flags = [m.is_causal for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else not _CACHES.isdisjoint(inspect.signature(stack.forward).parameters)
