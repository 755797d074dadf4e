"""The only reader of Hugging Face internals: stacks, attention layers and their sizes, embeddings, heads, positions.

Sizes are observed, not derived from configs: a forward of three tokens shows every attention layer's keys and values,
so grouped-query attention, uneven layers and layers without attention need no special case. Knows nothing about
adapters.

Internal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import compat
from softtune.backbone.checkpointing import (
    around_runs,
    is_checkpointing,
    is_reentrant,
    keeping_caches,
    without_gradient_checkpointing,
)
from softtune.backbone.generation import counting_words
from softtune.backbone.modes import evaluating, training
from softtune.backbone.observation import keys_and_values, seen_attention, seen_outputs
from softtune.backbone.outputs import Observed, Outputs, with_rows
from softtune.backbone.quantization import has_backward, is_packed, quantized_layers
from softtune.backbone.roles import CHANNELS_FIRST, BiasSlot, bias_slots, module_slots, role_slots
from softtune.backbone.routing import forget_configs, install
from softtune.backbone.session import model_session
from softtune.backbone.sharding import full_tensor, unpartitioned
from softtune.backbone.stack import (
    AttentionLayer,
    Place,
    Site,
    Stack,
    cached_length,
    device_of,
    is_causal,
    skipped,
)
from softtune.errors import UnsupportedModelError

__all__ = [
    "AttentionLayer",
    "Backbone",
    "Place",
    "Site",
    "Stack",
    "around_runs",
    "cached_length",
    "counting_words",
    "device_of",
    "evaluating",
    "install",
    "is_checkpointing",
    "is_reentrant",
    "keeping_caches",
    "model_session",
    "skipped",
]

Modules = dict[str, Callable[[], nn.Module | None]]
"""Weak references to a model's modules, by name."""


class Backbone:
    """Describes a base model: its stacks, attention layers, embeddings and heads.

    The model's tensors are neither copied nor changed.

    Args:
        model: a Hugging Face transformer, with or without a head.

    Raises:
        UnsupportedModelError: the model, or a stack of it, is no ``PreTrainedModel``, or its decoder attends to later
            tokens.
    """

    @classmethod
    def shared(cls, model: PreTrainedModel) -> Backbone:
        """The backbone of a base model that everyone who asks shares, so that each fact is observed once.

        Another one is made where modules have been replaced or added since.

        Raises:
            UnsupportedModelError: see the class.
        """
        _check_transformer(model)
        modules = dict(model.named_modules())
        known, backbone = _SHARED.get(model, ({}, lambda: None))
        is_same = known.keys() == modules.keys() and all(known[name]() is module for name, module in modules.items())
        shared = backbone() if is_same else None
        if shared is None:
            shared = cls(model)
            _SHARED[model] = ({name: ref(module) for name, module in modules.items()}, ref(shared))
        return shared

    def __init__(self, model: PreTrainedModel) -> None:
        _check_transformer(model)
        forget_configs(model)
        self.model = model
        self.stacks = _stacks(model)
        self.embedding = self.stacks[0].embedding
        """The word embedding of the first stack, which reads ``input_ids``."""

    @property
    def device(self) -> torch.device:
        """The device on which the base model computes."""
        return device_of(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        return len(self.stacks) == 2

    @property
    def is_decoder_only(self) -> bool:
        return [s.site for s in self.stacks] == [Site.DECODER]

    @property
    def continues_text(self) -> bool:
        """Whether the model is a decoder with a language head, so that labels are tokens of the input."""
        return self.is_decoder_only and self.model.get_output_embeddings() is not None

    @property
    def labels_whole_texts(self) -> bool:
        """Whether a label belongs to a whole text (sequence classification, multiple choice) rather than to a token."""
        return self.compares_choices or type(self.model).__name__.endswith("ForSequenceClassification")

    @property
    def has_task_head(self) -> bool:
        """Whether the model has a head for classification, multiple choice or question answering."""
        labels_parts = type(self.model).__name__.endswith(("ForTokenClassification", "ForQuestionAnswering"))
        return (self.labels_whole_texts or labels_parts) and bool(self.head_names)

    @property
    def compares_choices(self) -> bool:
        """Whether the model is for multiple choice: a row has several texts, [B, choices, T]."""
        return type(self.model).__name__.endswith("ForMultipleChoice")

    @property
    def judges_whole_texts(self) -> bool:
        """Whether the head reads an encoder's output at the first slot, as sequence classifiers do (CLS pooling)."""
        whole = (
            self.labels_whole_texts and getattr(self.model.config, "classifier_pooling", "cls") == "cls"
        )  # ModernBERT's option
        return whole and self.stacks[0].site is Site.ENCODER and not self.is_encoder_decoder

    @property
    def takes_vectors(self) -> bool:
        """Whether the model takes ``inputs_embeds`` in place of ``input_ids``."""
        return self._word_scale is not None

    @property
    def has_plain_words(self) -> bool:
        """Whether word embeddings reach the layers unscaled, and an encoder has no local attention."""
        is_local = not self.stacks[0].is_causal and getattr(self.text_config, "local_attention", None) is not None
        return self._word_scale == 1.0 and not is_local

    @property
    def _word_scale(self) -> float | None:
        with model_session(self.model):
            return self.stacks[0].word_scale

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def max_positions(self) -> int | None:
        """``max_position_embeddings``, the longest sequence that the model is made for; None if it is not set."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def has_local_layers(self) -> bool:
        """Whether a layer does not attend to all earlier tokens, such as one with a sliding window."""
        kinds = getattr(self.text_config, "layer_types", None)
        if kinds is not None:
            return {*kinds} != {"full_attention"}
        return getattr(self.text_config, "sliding_window", None) is not None

    @property
    def hidden_dropout(self) -> float:
        """The dropout probability of hidden states in training."""
        return compat.hidden_dropout(self.text_config)

    @cached_property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every attention layer that can take a prefix, ordered by site and depth; empty where none can."""
        ids = torch.zeros(1, 3, dtype=torch.long)
        with model_session(self.model), evaluating(self.model):
            return [seen.layer for seen in seen_attention(self.model, self.stacks, input_ids=ids)]

    @property
    def is_known(self) -> bool:
        """Whether ``attention_layers`` has been computed."""
        return "attention_layers" in vars(self)

    @property
    def takes_wrapper(self) -> bool:
        """Whether attention layers call a wrapper; if not, a prefix can only be passed as a cache, if at all."""
        return any(layer.module is not None for layer in self.attention_layers)

    def keys_and_values(self, input_ids: Tensor) -> dict[Place, tuple[Tensor, Tensor]]:
        """Compute the keys [H, T, K] and values [H, T, V] of a text in the frozen attention layers, by site and layer.

        Args:
            input_ids: [T]. An encoder-decoder's decoder reads the same text, less its last token.
        """
        with model_session(self.model), evaluating(self.model):
            return keys_and_values(self.model, self.stacks, input_ids=input_ids[None])

    @cached_property
    def is_pure_attention_decoder(self) -> bool:
        """Whether the model is a decoder in which every layer is an attention layer.

        Keys and values are then all that later tokens take from earlier ones.
        """
        return self.is_decoder_only and len(self.attention_layers) == self.depth

    @property
    def depth(self) -> int | None:
        """The number of layers of a stack; None where the config does not say."""
        return getattr(self.text_config, "num_hidden_layers", None)

    @property
    def packs(self) -> bool:
        """Whether rows can be packed: only attention mixes tokens, and its rows may differ from those of the input."""
        return self.is_pure_attention_decoder and self.takes_wrapper and self.stacks[0].takes_position_ids

    @property
    def is_random_in_training(self) -> bool:
        """Whether dropout, noise or layerdrop make a text's outputs differ from one training step to the next."""
        stack = self.stacks[0]
        with model_session(self.model), training(stack.module):
            return stack.is_random

    def starts_at(self, depth: int) -> bool:
        """Whether the layers from ``depth`` on can run on saved hidden states, without running the layers below."""
        if not self.packs or len(self.attention_layers) != len(self.stacks[0].layers):
            return False
        pairs = zip(self.attention_layers, self.stacks[0].layers, strict=True)
        are_apart = all(a.module in {*layer.modules()} and not a.is_shared for a, layer in pairs)
        with model_session(self.model):
            return are_apart and self.stacks[0].starts_at(depth)

    def compile_layers(self) -> None:
        """Compile each layer of every stack when it first runs; identical layers share one compilation."""
        for stack in self.stacks:
            for layer in stack.layers:
                layer.compile(dynamic=True)

    def keys_of_vectors(self, vectors: Tensor) -> dict[Place, tuple[Tensor, Tensor]]:
        """Compute the keys [H, P, K] and values [H, P, V] of virtual tokens [P, D] in front of a text, with gradients.

        The model stays in its mode. Gradient checkpointing is off, since nothing would recompute the tensors kept here.
        """
        with (
            model_session(self.model),
            without_gradient_checkpointing(self.model),
        ):  # a copy, since CTRL scales its input in place
            embeds = vectors[None].to(self.model.dtype, copy=True)
            return keys_and_values(self.model, self.stacks, inputs_embeds=embeds)

    def logits_of_vectors(self, vectors: Tensor) -> Tensor:
        """Compute a language model's logits [P, V] of virtual tokens [P, D] in front of a text, with gradients."""
        with model_session(self.model):
            embeds = vectors[None].to(self.model.dtype, copy=True)  # a copy, as in ``keys_of_vectors``
            logits: Tensor = self.model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits[0]
            return logits

    def check_gradients(self) -> None:
        """Check that gradients pass through the quantised layers.

        Each layer is observed once; whether its weights are packed is looked up at every call.

        Raises:
            UnsupportedModelError: they do not, so that an adapter would not be trained, or by wrong gradients.
        """
        if packed := [name for name, layer in self._quantized_layers.items() if is_packed(layer)]:
            raise UnsupportedModelError(
                f"bitsandbytes has packed the weights of {_and_others(packed)} for inference, which have no gradient",
                "load the base model again and evaluate it through its PeftModel, which keeps them unpacked",
            )
        if self._layers_without_backward:
            raise UnsupportedModelError(
                f"no gradient passes through the quantised weights of {_and_others(self._layers_without_backward)}",
                "train on a base model whose weights alone are quantised, such as by bitsandbytes, or, where nothing "
                "is to be trained, call it under torch.no_grad()",
            )

    @cached_property
    def _quantized_layers(self) -> dict[str, nn.Module]:
        return quantized_layers(self.model)

    @cached_property
    def _layers_without_backward(self) -> list[str]:
        with model_session(self.model):
            layers = self._quantized_layers.items()
            return [name for name, layer in layers if not has_backward(layer, self.model.dtype, self.device)]

    @property
    def head_names(self) -> list[str]:
        """Names of the modules that the task's class adds to the base model: a classifier, a span head; no language
        head."""
        base, lm_head = self.model.base_model, self.model.get_output_embeddings()
        if base is self.model:
            return []
        children = [(name, set(child.modules()), child) for name, child in self.model.named_children()]
        return [
            n for n, parts, child in children if child is not base and lm_head not in parts and [*child.parameters()]
        ]

    def bias_slots(self) -> list[BiasSlot]:
        """Every module output below the head that has a bias, or could be given one."""
        return self._below_heads(bias_slots(self.model, self._prefix))

    def role_slots(self, roles: Collection[str], *, is_input: bool = False) -> list[BiasSlot]:
        """The outputs, or inputs, of the modules of some roles below the head; see ``roles.role_slots``."""
        return self._below_heads(role_slots(self.model, self._prefix, roles, is_input=is_input))

    def module_slots(
        self, name: str, roles: Collection[str] | None = None, *, is_input: bool = False
    ) -> list[BiasSlot]:
        """The slots of one module by name, wherever it is; see ``roles.module_slots``.

        Empty where the module's output, or input, cannot be changed.
        """
        return self._that_fit(module_slots(self.model, name, roles, is_input=is_input))

    def slot(self, name: str, *, is_input: bool = False) -> BiasSlot:
        """A slot by its ``name``, which was one of ``bias_slots``, ``role_slots`` or ``module_slots``."""
        parent, _, last = name.rpartition(".")
        is_module = hasattr(self.model.get_submodule(parent), last)
        (slot,) = module_slots(self.model, *((name,) if is_module else (parent, [last])), is_input=is_input)
        return slot

    @property
    def _prefix(self) -> str:
        """What the names of the modules below the head begin with."""
        prefix = self.model.base_model_prefix
        return f"{prefix}." if hasattr(self.model, prefix) else ""

    def _below_heads(self, slots: Sequence[BiasSlot]) -> list[BiasSlot]:
        """Drop the slots of heads, and of modules whose output, or input, cannot be changed."""
        heads = set(self.head_names)
        slots = [s for s in slots if s.module.split(".")[0] not in heads]
        if self.is_encoder_decoder:  # a decoder does not read the pooler of a BERT before it
            slots = [s for s in slots if ".pooler." not in s.module]
        return self._that_fit(slots)

    def _that_fit(self, slots: Sequence[BiasSlot]) -> list[BiasSlot]:
        """Drop the slots of modules whose output, or input, cannot be changed.

        Some modules do not return a feature vector for each token. Others are never called, since the module around
        them reads their weights.
        """

        def fits(slot: BiasSlot) -> bool:
            if (calls := self._calls(slot.is_input).get(slot.module)) is None:
                return slot.module.rpartition(".")[0] not in self._observed.outputs
            if isinstance(self.model.get_submodule(slot.module), CHANNELS_FIRST):
                return False
            return all(c.width is not None and (slot.index is not None or c.width == slot.width) for c in calls)

        return [slot for slot in slots if fits(slot)]

    @cached_property
    def row_modules(self) -> frozenset[str]:
        """Names of the modules whose outputs keep the rows of a batch in order, as [B, ...] or [B·T, ...].

        Below the head this is observed; the head's modules are all included.
        """
        return with_rows(self.model, self._observed.outputs) | self._above

    @cached_property
    def row_inputs(self) -> frozenset[str]:
        """Names of the modules whose first argument keeps the rows in order; see ``row_modules``."""
        return with_rows(self.model, self._observed.inputs) | self._above

    @property
    def _above(self) -> set[str]:
        """Names of the head's modules."""
        below = set(self.model.base_model.modules())
        return {name for name, module in self.model.named_modules() if module not in below}

    def is_by_head(self, name: str, *, is_input: bool = False) -> bool:
        """Whether a module's output, or input, is [B, heads, T, ...], as that of a query norm may be."""
        return any(call.is_by_head for call in self._calls(is_input).get(name, ()))

    def _calls(self, is_input: bool) -> Outputs:
        return self._observed.inputs if is_input else self._observed.outputs

    @cached_property
    def _observed(self) -> Observed:
        with model_session(self.model), evaluating(self.model):
            return seen_outputs(self.model, self.stacks)

    def embedding_sample(self, rows: int | None = None, size: int = 16) -> list[float]:
        """Sample a few values of the word embedding, by which an adapter recognizes its base model at any precision.

        Args:
            rows: the embedding's number of rows when the sample to compare with was taken. The same values are picked
                as then, except those of rows that no longer exist. By default the current number.
            size: number of values.
        """
        with align_module_device(self.embedding), unpartitioned(self.embedding):
            weights = full_tensor(self.embedding.weight.detach()).flatten()
            numbers = weights.numel() if rows is None else rows * self.embedding.embedding_dim
            picks = torch.linspace(0, numbers - 1, size + 2, dtype=torch.float64).long()[1:-1]
            picks = picks[picks < weights.numel()]
            return [round(float(x), 6) for x in weights[picks.to(weights.device)]]


_SHARED: WeakKeyDictionary[PreTrainedModel, tuple[Modules, Callable[[], Backbone | None]]] = WeakKeyDictionary()
"""The backbones in use, by base model: the modules that each describes, and a weak reference to it."""


def _and_others(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more layers" if len(names) > 1 else names[0]


def _check_transformer(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Hugging Face transformer", "load the model by from_pretrained"
        )


def _stacks(model: PreTrainedModel) -> list[Stack]:
    """The stacks of a model: one, or the two of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        stack = _decoder_of(model)
        return [Stack(stack, Site.DECODER if is_causal(model, stack) else Site.ENCODER)]
    encoder, decoder = _below_head(model.get_encoder()), _decoder_of(model.get_decoder())
    if encoder in decoder.modules():  # UMT5's encoder alone
        return [Stack(encoder, Site.ENCODER)]
    stacks = [Stack(encoder, Site.ENCODER), Stack(decoder, Site.DECODER)]
    if stacks[1].sees_later_words:
        raise UnsupportedModelError(
            f"{type(model).__name__}'s decoder sees later words in this transformers", "install 5.18 or newer"
        )
    return stacks


def _decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without the models around it: BLIP-2's language model calls OPT's decoder directly, as BART's do."""
    decoder = model.get_decoder()  # a masked language model's output matrix may have that name
    stack = _below_head(decoder if isinstance(decoder, PreTrainedModel) else model)
    return stack if stack is model or stack.get_decoder() is stack else _decoder_of(stack)


def _below_head(stack: nn.Module) -> PreTrainedModel:
    """The stack below any head: the encoder and decoder of an ``EncoderDecoderModel`` have heads of their own."""
    if not isinstance(stack, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(stack).__name__} is no model of its own, so that no prompt reaches it", "use another base model"
        )
    base: nn.Module = stack.base_model
    if base is not stack:
        return _below_head(base)
    if stack.get_output_embeddings() is None:
        return stack
    # Llama 4's text model has its language head inside.
    embedding = stack.get_input_embeddings()
    inner = [m for m in stack.children() if isinstance(m, PreTrainedModel) and embedding in m.modules()]
    return _below_head(inner[0]) if inner else stack
