"""One run of transformer layers: its embeddings, positions, cache and attention layers. Knows nothing about heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import compat
from softtune.backbone.checkpointing import without_gradient_checkpointing
from softtune.backbone.modes import evaluating
from softtune.backbone.refusal import reading_text
from softtune.errors import UnsupportedModelError

_ADDED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache")
"""Arguments through which a prompt reaches a stack."""


TOKENS, PADDING = 4, 2
"""Lengths of a text and of its padding that show whether padding changes the outputs."""


class Site(str, Enum):
    """Where a prefix attaches: encoder self-attention, decoder self-attention or cross-attention."""

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
    query_heads: int = 0
    """The number of query heads; 0 where it was not observed."""
    module: nn.Module | None = None
    """The module that calls the attention interface; None in models that take a prefix only as a cache."""

    is_shared: bool = False
    """Whether other layers attend to the same keys and values."""
    shared_from: int | None = None
    """Number of the earlier layer whose keys and values this one attends to; None where it computes its own."""
    is_cached: bool = True
    """Whether the model's cache holds these keys and values for this layer alone: neither a latent of them, nor those
    of layers that share them."""

    @property
    def place(self) -> Place:
        return self.site, self.index

    @property
    def width(self) -> int:
        """Number of values of one virtual token in this layer: its keys and values together."""
        return self.heads * (self.key_size + self.value_size)


class Stack:
    """One run of transformer layers with its own embeddings: an encoder or a decoder."""

    def __init__(self, module: PreTrainedModel, site: Site) -> None:
        self.module = module
        self.site = site
        self.signature = inspect.signature(module.forward)
        self._random: dict[int, bool] = {}
        """``is_random`` by the modules' modes and rates."""

    @property
    def is_causal(self) -> bool:
        return self.site is Site.DECODER

    @property
    def takes_position_ids(self) -> bool:
        return "position_ids" in self.signature.parameters

    @property
    def keeps_states(self) -> bool:
        """Whether layers store their states in themselves and reset them only at position 0, as RecurrentGemma's do."""
        return compat.keeps_states(self.module)

    @property
    def position_table(self) -> nn.Module | None:
        """The position embedding of BART and its relatives, which counts positions itself and takes an offset."""
        return None if self.takes_position_ids else compat.position_table(self.module)

    @property
    def counts_unheard(self) -> bool:
        """Whether positions come from a table and no argument can set them."""
        return compat.has_position_table(self.module) and not self.takes_position_ids and self.position_table is None

    @cached_property
    def is_disentangled(self) -> bool:
        """Whether its attention is DeBERTa's, which calls no interface."""
        return any(map(compat.is_disentangled, self.module.modules()))

    @cached_property
    def first_position(self) -> int:
        """The position of the first real token: in RoBERTa and its relatives the one after the padding's."""
        return compat.first_position(self.module)

    @cached_property
    def table_size(self) -> int | None:
        """The number of positions in the stack's table; None where they are rotary, relative or linear biases."""
        size = compat.table_size(self.module)
        return size - self.first_position if size else None

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding.

        Raises:
            UnsupportedModelError: the stack has no plain one.
        """
        return word_embedding(self.module)

    def some_ids(self, count: int) -> Tensor:
        """Token ids [count], all different if the vocabulary has so many."""
        return torch.arange(count, device=self.device) % self.embedding.num_embeddings

    @property
    def drops_layers(self) -> bool:
        """Whether layerdrop may skip layers in the current mode."""
        return self.module.training and self.has_layerdrop

    @property
    def has_layerdrop(self) -> bool:
        """Whether layerdrop may skip layers in training."""
        return any(getattr(m, "layerdrop", 0) > 0 for m in self.module.modules())

    @property
    def is_random(self) -> bool:
        """Whether dropout, noise or layerdrop make the outputs of equal inputs differ in the current mode.

        Observed once for each mode and each setting of the rates.
        """
        if not self.module.training:
            return False
        modules = [*self.module.modules()]
        rates = [x for m in (self.module.config, *modules) for x in vars(m).values() if isinstance(x, float)]
        setting = hash((*rates, *(m.training for m in modules)))
        if setting not in self._random:
            self._random[setting] = self.drops_layers or self._runs_differ()
        return self._random[setting]

    def _runs_differ(self) -> bool:
        """Whether two forwards of the same text differ: of 32 tokens, or as many as there are positions for."""
        ids = self.some_ids(min(32, self.table_size or 32))[None]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), without_gradient_checkpointing(self.module):
            first, second = (self.module.forward(input_ids=ids).last_hidden_state for _ in range(2))
        return not torch.equal(first, second)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The layers in the order in which they run; empty where they are not in a ``ModuleList``."""
        count = getattr(self.module.config, "num_hidden_layers", None)
        lists = (m for m in self.module.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return list(next(lists, ()))

    def run_below(self, depth: int, **inputs: Any) -> Tensor:
        """Compute the hidden states [B, T, D] that reach layer ``depth``, without gradients or later layers."""
        reached: list[Tensor] = []

        def note(states: Tensor) -> Tensor:
            reached.append(states)
            return states

        with torch.no_grad(), without_gradient_checkpointing(self.module), skipped(self.layers[depth:], note):
            # Not the module itself, whose hooks would see one more call.
            self.module.forward(**inputs, use_cache=False)
        return reached[0]

    def starts_at(self, depth: int) -> bool:
        """Whether layers from ``depth`` on depend on those below only through the hidden states [B, T, D].

        Observed on a text of three tokens: the outputs must be the same if the layers below return saved states.
        """
        ids = self.some_ids(3)[None]
        with evaluating(self.module):
            expected, states = self._states(input_ids=ids), self.run_below(depth, input_ids=ids)
            with skipped(self.layers[:depth], lambda _: states):
                found = self._states(input_ids=ids)
        return states.dim() == 3 and torch.allclose(found, expected, atol=1e-3)

    def causal_masks(self, length: int) -> Any:
        """Create the causal mask [1, 1, T, T] of a text without padding, as the model's layers take it.

        Returns a dict of masks by the name of the layer kind where the model has several.
        """
        config, inputs_embeds = (
            self.module.config,
            torch.empty(1, length, 0, dtype=self.module.dtype, device=self.device),
        )
        masks = compat.create_masks(config, inputs_embeds)
        plain = torch.ones(1, 1, length, length, dtype=torch.bool, device=inputs_embeds.device).tril()
        if isinstance(masks, dict):
            return {name: plain if mask is None else mask for name, mask in masks.items()}
        return plain if masks is None else masks

    @cached_property
    def relative_bias(self) -> nn.Module | None:
        """T5's attention module with the relative position bias of the whole stack; in UMT5, the first such module."""
        return next(filter(compat.has_relative_bias, self.module.modules()), None)

    @property
    def sees_later_words(self) -> bool:
        """Whether a decoder's attention is wrongly marked as not causal, as UMT5's is in transformers 5.17."""
        return self.is_causal and getattr(self.relative_bias, "is_causal", True) is False

    def bias_owner(self, layer: nn.Module) -> nn.Module | None:
        """The attention module whose relative position bias a layer adds: the layer in UMT5, the stack's in T5."""
        return layer if compat.has_relative_bias(layer) else self.relative_bias

    def prefix_bias(self, owner: Any, positions: Tensor, length: int) -> Tensor:
        """Compute T5's bias [B, heads, T, P] of queries at positions [B, T] for a prefix right before position 0."""
        distance = torch.arange(-length, 0, device=positions.device) - positions[..., None]
        return compat.relative_bias(owner, distance, bidirectional=not self.is_causal).permute(0, 3, 1, 2)

    @cached_property
    def word_scale(self) -> float | None:
        """The factor by which the stack scales the embeddings of ``input_ids``, but not ``inputs_embeds``.

        It is not 1 in the encoders of Marian and Pegasus. None where the stack does not take ``inputs_embeds``.
        """
        padding = getattr(self.module.config, "pad_token_id", None)
        token_id = (padding or 0) + 1  # padding has a position of its own in RoBERTa
        ids = self.some_ids(token_id + 1)[-1].expand(1, 3)
        embedded = self.module.get_input_embeddings()(ids)
        try:
            self._states(inputs_embeds=embedded + 1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # Gemma 4 looks up the ids of all vectors
            return None
        with reading_text(self.module):
            expected = self._states(input_ids=ids)
        scales = (1.0, float(getattr(self.module, "embed_scale", 1.0)))
        fits = (s for s in scales if torch.allclose(self._states(inputs_embeds=embedded * s), expected, atol=1e-3))
        return next(fits, None)

    def _states(self, **inputs: Tensor) -> Tensor:
        with evaluating(self.module):
            # Not the module itself, whose hooks would see one more call.
            states: Tensor = self.module.forward(**inputs).last_hidden_state
            return states

    @cached_property
    def ignores_padding(self) -> bool:
        """Whether padding leaves the outputs of tokens unchanged: left padding in a decoder, right in an encoder."""
        ids = self.some_ids(TOKENS)[None]
        mask = torch.ones_like(ids)
        blank = torch.zeros_like(ids[:, :PADDING])
        parts = ((blank, mask), (ids[:, :PADDING], ids)) if self.is_causal else ((mask, blank), (ids, ids[:, :PADDING]))
        padded_mask, padded = (torch.cat(pair, dim=1) for pair in parts)
        positions = (padded_mask.cumsum(1) - 1).clamp(min=0) + self.first_position
        places = {"position_ids": positions} if self.takes_position_ids and self.is_causal else {}
        with reading_text(self.module):
            expected = self._states(input_ids=ids, attention_mask=mask)
            found = self._states(input_ids=padded, attention_mask=padded_mask, **places)[padded_mask != 0]
        return is_close(found, expected[0])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed ``input_ids`` [B, T] as the first layer sees them, [B, T, D]: scaled where the model scales them."""
        embedded: Tensor = self.module.get_input_embeddings()(input_ids)
        return embedded * (self.word_scale or 1.0)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call to the stack, by softtune's names.

        Raises:
            DataError: an argument, such as the cache, is given under two names.
        """
        bound = self.signature.bind(*args, **kwargs).arguments
        rest = bound.pop("kwargs", {})
        return compat.canonical({**bound, **rest})

    def keywords(self, call: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Translate a call's arguments to the stack's own names.

        Args:
            call: arguments by softtune's names.
            given: the keyword arguments that the caller passed to the stack.

        Raises:
            UnsupportedModelError: the stack has no parameter for an argument that softtune added.
        """
        arguments, parameters = compat.renamed(call, self.module.forward), self.signature.parameters
        for name in (compat.spelled(name, parameters) for name in _ADDED):
            if arguments.get(name) is not None and name not in parameters and given.get(name) is None:
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} of transformers {compat.INSTALLED} takes no {name}, by which a "
                    "prompt reaches it",
                    "install a version that docs/support.md names",
                )
        return arguments


@contextmanager
def skipped(layers: Sequence[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace layers by ``change``, applied to the hidden states that reach them, for the length of the block."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return change(hidden_states)

    instead = {"forward": forward, compat.CHECKPOINTS: False}
    originals = [{name: vars(layer)[name] for name in instead if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(instead)
        yield
    finally:
        for layer, before in zip(layers, originals, strict=True):
            for name in instead:
                vars(layer).pop(name, None)
            vars(layer).update(before)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ only by rounding in their own precision."""
    tolerance = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) <= tolerance


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes: that of its parameters, or accelerate's execution device if all of them are
    offloaded."""
    if device := next((p.device for p in model.parameters() if not p.is_meta), None):
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((place for place in places if place is not None), "meta"))


def cached_length(call: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of tokens in the cache of a call to a stack, and whether any text precedes the call's.

    A cache of recurrent states alone counts no tokens.
    """
    cache = compat.cache_of(call)
    if cache is None or isinstance(cache, list):
        return 0, cache is not None
    try:
        length = int(cache.get_seq_length())
    except ValueError:
        return 0, bool(cache.has_previous_state())
    return length, length > 0


def word_embedding(stack: PreTrainedModel) -> nn.Embedding:
    """A stack's word embedding, without the wrappers of PEFT's LoRA.

    Raises:
        UnsupportedModelError: it has none, or one of another kind.
    """
    try:
        embedding = stack.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    for wrapped in ("original_module", "base_layer"):
        embedding = getattr(embedding, wrapped, embedding)
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedModelError(
            f"{type(stack).__name__} has no one embedding of words", "use a base model that reads text"
        )
    return embedding


def is_causal(model: PreTrainedModel, stack: PreTrainedModel) -> bool:
    """Whether a model's only stack is a decoder.

    The ``is_causal`` flags of its modules decide. Where these do not say so and the model is untested, a forward shows
    whether the first token's output depends on later tokens.
    """
    flags = [m.is_causal for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if any(flags):
        return True
    if compat.is_tested(model) or device_of(stack).type == "meta":
        return not flags and compat.takes_cache(inspect.signature(stack.forward).parameters)
    if model not in _CAUSAL:
        _CAUSAL[model] = _sees_nothing_later(stack)
    return _CAUSAL[model]


_CAUSAL: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model's stack is causal, as observed."""


def _sees_nothing_later(stack: PreTrainedModel) -> bool:
    """Whether the first token's output is the same whatever tokens follow it."""
    vocab_size = word_embedding(stack).num_embeddings
    numbers = torch.arange(2 * TOKENS, device=device_of(stack)).view(2, TOKENS) % vocab_size
    ids = torch.cat([numbers[:, :1] * 0, numbers.where(numbers != 0, vocab_size - 1)], dim=1)
    with evaluating(stack), reading_text(stack):
        states = stack.forward(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return is_close(states[0, 0], states[1, 0])
