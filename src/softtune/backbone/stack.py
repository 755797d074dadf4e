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
from softtune.backbone.checkpointing import unchecked
from softtune.backbone.modes import evaluating
from softtune.backbone.refusal import reading_text
from softtune.errors import UnsupportedModelError

_ADDED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache")
"""Arguments by which a prompt reaches a stack."""


TOKENS, PADDING = 4, 2
"""Of a text that shows whether padding acts."""


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

    is_shared: bool = False
    """Whether other layers attend to the same keys and values."""
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
        self._random: dict[int, bool] = {}
        """Whether it is random, by mode and rates."""

    @property
    def is_causal(self) -> bool:
        return self.site is Site.DECODER

    @property
    def takes_position_ids(self) -> bool:
        return "position_ids" in self.signature.parameters

    @property
    def keeps_states(self) -> bool:
        """Whether layers of RecurrentGemma keep states to themselves, and begin anew where a position is 0 alone."""
        return compat.keeps_states(self.module)

    @property
    def position_table(self) -> nn.Module | None:
        """The position embedding of BART's kin, which counts for itself and takes an offset."""
        return None if self.takes_position_ids else compat.position_table(self.module)

    @property
    def counts_unheard(self) -> bool:
        """Whether it looks positions up in a table and nobody can say which."""
        return compat.has_position_table(self.module) and not self.takes_position_ids and self.position_table is None

    @cached_property
    def first_position(self) -> int:
        """The first real token's position: RoBERTa's kin begin behind their padding's."""
        return compat.first_position(self.module)

    @cached_property
    def table_size(self) -> int | None:
        """Positions that the stack has a table for; None where they are rotary, relative or linear biases."""
        size = compat.table_size(self.module)
        return size - self.first_position if size else None

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding. Raises UnsupportedModelError where the stack has no plain one."""
        return word_embedding(self.module)

    def some_ids(self, count: int) -> Tensor:
        """[count] different words, as far as there are so many."""
        return torch.arange(count, device=self.device) % self.embedding.num_embeddings

    @property
    def drops_layers(self) -> bool:
        """Whether layers may be left out by chance in this mode."""
        return self.module.training and self.has_layerdrop

    @property
    def has_layerdrop(self) -> bool:
        """Whether layers may be left out by chance in training."""
        return any(getattr(m, "layerdrop", 0) > 0 for m in self.module.modules())

    @property
    def is_random(self) -> bool:
        """Whether dropout, noise or layers left out make equal tokens differ in this mode: seen once for each mode and
        each choice of rates."""
        if not self.module.training:
            return False
        modules = [*self.module.modules()]
        rates = [x for m in (self.module.config, *modules) for x in vars(m).values() if isinstance(x, float)]
        setting = hash((*rates, *(m.training for m in modules)))
        if setting not in self._random:
            self._random[setting] = self.drops_layers or self._runs_differ()
        return self._random[setting]

    def _runs_differ(self) -> bool:
        """Whether two forwards of a text of 32 tokens differ, or as many as the model has positions for."""
        ids = self.some_ids(min(32, self.table_size or 32))[None]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), unchecked(self.module):
            first, second = (self.module.forward(input_ids=ids).last_hidden_state for _ in range(2))
        return not torch.equal(first, second)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The layers in the order in which they run; empty where they are no list of modules."""
        count = getattr(self.module.config, "num_hidden_layers", None)
        lists = (m for m in self.module.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return list(next(lists, ()))

    def run_below(self, depth: int, **inputs: Any) -> Tensor:
        """Hidden states [B, T, D] that reach layer ``depth``, without gradients; layers from there on don't run."""
        reached: list[Tensor] = []

        def note(states: Tensor) -> Tensor:
            reached.append(states)
            return states

        with torch.no_grad(), unchecked(self.module), skipped(self.layers[depth:], note):
            # Not the module itself, whose hooks would see one more call.
            self.module.forward(**inputs, use_cache=False)
        return reached[0]

    def starts_at(self, depth: int) -> bool:
        """Whether layers from ``depth`` on take nothing from those below but hidden states [B, T, D]: seen on a text of
        three tokens, whose outputs are the same where the layers below are handed their own."""
        ids = self.some_ids(3)[None]
        with evaluating(self.module):
            expected, states = self._states(input_ids=ids), self.run_below(depth, input_ids=ids)
            with skipped(self.layers[:depth], lambda _: states):
                found = self._states(input_ids=ids)
        return states.dim() == 3 and torch.allclose(found, expected, atol=1e-3)

    def causal_masks(self, length: int) -> Any:
        """A mask [1, 1, T, T] of a text without padding, or one for each kind of layer by its name, as the model's own
        layers want them."""
        config, words = (
            self.module.config,
            torch.empty(1, length, 0, dtype=self.module.dtype, device=self.device),
        )
        masks = compat.create_masks(config, words)
        plain = torch.ones(1, 1, length, length, dtype=torch.bool, device=words.device).tril()
        if isinstance(masks, dict):
            return {name: plain if mask is None else mask for name, mask in masks.items()}
        return plain if masks is None else masks

    @cached_property
    def relative_bias(self) -> nn.Module | None:
        """T5's attention module that owns the relative position bias of the whole stack; the first of UMT5's."""
        return next(filter(compat.has_relative_bias, self.module.modules()), None)

    @property
    def sees_later_words(self) -> bool:
        """Whether a decoder's attention is told that it is none, as UMT5's is in transformers 5.17."""
        return self.is_causal and getattr(self.relative_bias, "is_causal", True) is False

    def bias_owner(self, layer: nn.Module) -> nn.Module | None:
        """The attention module whose relative position bias a layer adds: its own in UMT5, the stack's in T5."""
        return layer if compat.has_relative_bias(layer) else self.relative_bias

    def prefix_bias(self, owner: Any, positions: Tensor, length: int) -> Tensor:
        """[B, heads, T, P] T5's bias of queries at positions [B, T] for a prefix that stands right before position
        0."""
        distance = torch.arange(-length, 0, device=positions.device) - positions[..., None]
        return compat.relative_bias(owner, distance, bidirectional=not self.is_causal).permute(0, 3, 1, 2)

    @cached_property
    def word_scale(self) -> float | None:
        """What the stack multiplies words with that it looks up by itself, but not vectors that come in their place:
        Marian's and Pegasus' encoders do. None where no vector can take a word's place."""
        padding = getattr(self.module.config, "pad_token_id", None)
        word = (padding or 0) + 1  # padding has a position of its own in RoBERTa
        ids = self.some_ids(word + 1)[-1].expand(1, 3)
        words = self.module.get_input_embeddings()(ids)
        try:
            self._states(inputs_embeds=words + 1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # Gemma 4 looks for the ids of all vectors
            return None
        with reading_text(self.module):
            expected = self._states(input_ids=ids)
        scales = (1.0, float(getattr(self.module, "embed_scale", 1.0)))
        fits = (s for s in scales if torch.allclose(self._states(inputs_embeds=words * s), expected, atol=1e-3))
        return next(fits, None)

    def _states(self, **inputs: Tensor) -> Tensor:
        with evaluating(self.module):
            # Not the module itself, whose hooks would see one more call.
            states: Tensor = self.module.forward(**inputs).last_hidden_state
            return states

    @cached_property
    def ignores_padding(self) -> bool:
        """Whether the outputs of tokens are the same beside padding: before them in a decoder, behind them in an
        encoder."""
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
        """Word vectors [B, T, D] as the first layer sees them, scaled where the model scales them."""
        embedded: Tensor = self.module.get_input_embeddings()(input_ids)
        return embedded * (self.word_scale or 1.0)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call to the stack, by softtune's names. Raises DataError where it has two caches."""
        bound = self.signature.bind(*args, **kwargs).arguments
        rest = bound.pop("kwargs", {})
        return compat.canonical({**bound, **rest})

    def keywords(self, call: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by the stack's own names.

        Args:
            call: by softtune's names.
            given: the keyword arguments that its caller has for the stack.

        Raises:
            UnsupportedModelError: the stack knows no name of an argument that was added, which it would not read.
        """
        own, parameters = compat.renamed(call, self.module.forward), self.signature.parameters
        for name in (compat.spelled(name, parameters) for name in _ADDED):
            if own.get(name) is not None and name not in parameters and given.get(name) is None:
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} of transformers {compat.INSTALLED} takes no {name}, by which a "
                    "prompt reaches it: install a version that docs/support.md names"
                )
        return own


@contextmanager
def skipped(layers: Sequence[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let layers do nothing but ``change`` the hidden states that reach them, for the length of the block."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return change(hidden_states)

    instead = {"forward": forward, compat.CHECKPOINTS: False}
    own = [{name: vars(layer)[name] for name in instead if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(instead)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            for name in instead:
                vars(layer).pop(name, None)
            vars(layer).update(before)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by rounding alone, in their own precision."""
    tolerance = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) <= tolerance


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where those of its parameters are that are not offloaded, or where accelerate brings
    them."""
    if here := next((p.device for p in model.parameters() if not p.is_meta), None):
        return here
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((place for place in places if place is not None), "meta"))


def cached_length(call: Mapping[str, Any]) -> tuple[int, bool]:
    """How many tokens the cache of a call to a stack counts, and whether there is any text before the call's.

    A cache of states alone counts none.
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
    """A stack's word embedding, out of what PEFT's LoRA has put around it.

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
            f"{type(stack).__name__} has no one embedding of words: use a base model that reads text"
        )
    return embedding


def is_causal(model: PreTrainedModel, stack: PreTrainedModel) -> bool:
    """Whether a model's only stack is a decoder: by what its modules say, and where that is not known to be right, by
    what its first token sees."""
    flags = [m.is_causal for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if any(flags):
        return True
    if compat.is_tested(model) or device_of(stack).type == "meta":
        return not flags and compat.takes_cache(inspect.signature(stack.forward).parameters)
    if model not in _CAUSAL:
        _CAUSAL[model] = _sees_nothing_later(stack)
    return _CAUSAL[model]


_CAUSAL: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What was seen of models."""


def _sees_nothing_later(stack: PreTrainedModel) -> bool:
    """Whether the first token's output is the same before other tokens."""
    words = word_embedding(stack).num_embeddings
    numbers = torch.arange(2 * TOKENS, device=device_of(stack)).view(2, TOKENS) % words
    ids = torch.cat([numbers[:, :1] * 0, numbers.where(numbers != 0, words - 1)], dim=1)
    with evaluating(stack), reading_text(stack):
        states = stack.forward(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return is_close(states[0, 0], states[1, 0])
