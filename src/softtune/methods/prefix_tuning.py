"""Prefix tuning: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

Every attention layer gets P trained keys and values in front of its own. Letters: P virtual tokens, L layers, H
key/value heads, K key size, D hidden size, W values of one virtual token over all layers (L·2·H·K where all layers
have the same sizes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone, Site
from softtune.errors import AdapterMismatchError, ConfigError, UnsupportedModelError
from softtune.methods import initialization as init
from softtune.methods.base import OURS, PeftType, PositiveInt, Probability, Prompt, PromptLearningConfig
from softtune.methods.kv_layout import (
    Layers,
    choose_layers,
    cut_out,
    fits,
    flat_prefix,
    is_even,
    is_uniform,
    settle_prefix,
    split_prefix,
)
from softtune.methods.prompt_tuning import check_vectors


@dataclass(kw_only=True, eq=False)
class PrefixTuningConfig(PromptLearningConfig):
    """Config of prefix tuning.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    peft_type: PeftType = PeftType.PREFIX_TUNING
    learning_rate: ClassVar[float] = 1e-2
    encoder_hidden_size: PositiveInt | None = None
    """Width of the projection's hidden layer; by default ``token_dim``."""
    prefix_projection: bool = False
    """Train the prefix through an MLP (the paper's reparameterisation), dropped after training."""
    init_weights: Literal["random", "zero", "vocabulary", "text"] | None = None
    """Initialize from N(0, 1), with zeros, or with the keys and values of common words or of ``init_text``. By default:
    the text if given, else common words; with a projection and no text, the projection's random output. PEFT's default
    is random."""
    init_text: str | None = field(default=None, metadata=OURS)
    """The text whose keys and values initialize the prefix."""
    tokenizer_name_or_path: str | None = field(default=None, metadata=OURS)
    """Tokenizer of ``init_text``; by default the base model's."""
    layers: Layers = field(default=None, metadata=OURS)
    """Layers that get a prefix: their numbers, ``"first:N"`` or ``"last:N"``; by default all."""
    sites: list[Site] | None = field(default=None, metadata=OURS)
    """Attention sites that get a prefix of their own: encoder, decoder, cross; by default all that the model has."""
    placement: Literal["prefix", "infix"] = field(default="prefix", metadata=OURS)
    """Before the text, or between the text and the answer (the paper's infix; decoders only)."""
    embedding_only: bool = field(default=False, metadata=OURS)
    """Train vectors at the input layer only and let the layers propagate them (the paper's ablation)."""
    shift_positions: bool = field(default=True, metadata=OURS)
    """Let the text start at position P, as in the paper and PEFT, instead of at 0."""
    token_dropout: Probability = field(default=0.0, metadata=OURS)
    """Probability with which a row of a training batch does not see a virtual token (arXiv 2507.04221)."""

    ways: ClassVar[tuple[str, ...]] = ("placement", "embedding_only", "shift_positions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights == "text" and self.init_text is None:
            raise ConfigError("init_weights = 'text' needs init_text", "write the words to start from")
        if self.init_text is not None and self.init_weights not in (None, "text"):
            raise ConfigError(f"init_weights = {self.init_weights!r} has no use for init_text", "drop one of them")
        if self.embedding_only and (self.layers or self.sites):
            raise ConfigError("embedding_only trains no layer", "drop layers and sites")
        if self.embedding_only and not self.shift_positions:
            raise ConfigError("embedding_only has its virtual tokens among the words", "drop shift_positions")
        if self.embedding_only and self.token_dropout:
            raise ConfigError("embedding_only has its virtual tokens among the words", "drop token_dropout")
        if self.inference_mode:
            return  # a saved config keeps its values, and one of PEFT's also those without effect
        if self.tokenizer_name_or_path is not None and self.init_text is None:
            raise ConfigError("tokenizer_name_or_path is for init_text", "write one, or drop the tokenizer")
        # PEFT sets encoder_hidden_size to token_dim, with a projection and without.
        if not self.prefix_projection and self.encoder_hidden_size != self.token_dim:
            self._leave_out("for the projection, and left out: set prefix_projection=True", encoder_hidden_size=None)

    def build(self, backbone: Backbone) -> PrefixEncoder | EmbeddingPrefix:
        """See ``PeftConfig.build``.

        Raises:
            ConfigError: the base model has no such layer or site.
            UnsupportedModelError: the base model cannot take a prefix, or not at this placement.
        """
        layers = [] if self.embedding_only else choose_layers(backbone, self.layers, self.sites)
        if self.placement == "infix" and not backbone.is_decoder_only:
            raise UnsupportedModelError(
                "an infix stands between text and answer of a decoder", "use placement='prefix' here"
            )
        if self.placement == "infix" and not backbone.takes_wrapper and not self.embedding_only:
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} takes a prefix alone", "use placement='prefix' here"
            )
        if self.embedding_only:
            check_vectors(backbone)
            self.settle(token_dim=backbone.embedding.embedding_dim)
            return EmbeddingPrefix(self)
        settle_prefix(self, backbone)
        return PrefixEncoder(self, layers)

    def initialize(self, module: PrefixEncoder | EmbeddingPrefix, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``.

        Raises:
            ConfigError: ``init_text`` has no tokens, or no tokenizer.
        """
        start = self.init_weights or (
            "text" if self.init_text else "random" if self.prefix_projection else "vocabulary"
        )
        if start == "zero":
            module.start_from(torch.zeros_like(module().detach()))
        elif start != "random":
            module.start_from(module.states_of_words(self._initial_ids(backbone), backbone))

    def _initial_ids(self, backbone: Backbone) -> Tensor:
        """[P] token ids to initialize from: those of ``init_text``, or of common words."""
        if self.init_text is None:
            return init.vocabulary_ids(backbone, self.num_virtual_tokens)
        tokenizer = init.load_tokenizer(self.tokenizer_name_or_path or backbone.model.name_or_path)
        return init.fill(init.text_ids(self.init_text, tokenizer)[0], self.num_virtual_tokens)

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        plain = self.placement == "prefix" and not self.embedding_only and self.shift_positions
        return plain and self.layers is None and not backbone.is_encoder_decoder and is_even(backbone)

    def from_peft(self, prompt: Tensor, module: Any) -> Tensor:
        """See ``PeftConfig.from_peft``, which differs for an encoder-decoder, and for a decoder with uneven layers.

        In an encoder-decoder, PEFT repeats the tensor's 2·L parts once, and layer l of the decoder's self-attention
        reads the parts 4l and 4l + 1. No other site gets a prefix. In a decoder such as Gemma 4, each layer reads as
        much of its parts as it has room for, and layers that would need more get no prefix. Where the first layer is
        one of these, texts start at position 0.

        Raises:
            AdapterMismatchError: the config has other sites.
        """
        if self.num_transformer_submodules != 2:
            return self._from_even(prompt, module)
        if self.sites != [Site.DECODER]:
            raise AdapterMismatchError(
                "PEFT's prefix is for the decoder's own attention", "set sites=['decoder'] in the config"
            )
        assert self.num_layers
        parts = prompt.view(len(prompt), 2 * self.num_layers, -1).repeat(1, 2, 1)
        by_layer = parts.view(len(prompt), self.num_layers, 4, -1)
        return by_layer[:, :, :2].flatten(1)

    def _from_even(self, prompt: Tensor, module: Any) -> Tensor:
        """[P, W] from PEFT's prompt, in which all layers of a decoder have keys and values of the same size."""
        assert self.num_layers
        assert self.num_attention_heads
        assert self.token_dim
        heads, size = self.num_attention_heads, self.token_dim // self.num_attention_heads
        if len(module.layers) == self.num_layers and is_uniform(module.layers, heads, size):
            return prompt
        fitting = [layer for layer in module.layers if fits(layer, heads, size)]
        if prompt.shape[1:] != (self.num_layers * 2 * heads * size,) or not fitting:
            return prompt
        if len(fitting) < len(module.layers):
            self.layers = [layer.index for layer in fitting]
            # transformers counts positions by the first layer's cache.
            self.shift_positions = self.shift_positions and fitting[0] is module.layers[0]
            module.limit_to(fitting, self)
        return cut_out(prompt.view(len(prompt), self.num_layers, 2, heads, size), fitting)

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftConfig.implied_by_peft``.

        In an encoder-decoder, only the decoder's self-attention gets a prefix. Without a projection there is no hidden
        layer.
        """
        sites = {"sites": [Site.DECODER]} if values.get("num_transformer_submodules") == 2 else {}
        return sites if values.get("prefix_projection") else {**sites, "encoder_hidden_size": None}


class PrefixEncoder(nn.Module):
    """The trained prefix, with or without a projection.

    Args:
        config: sizes (``num_virtual_tokens``, ``token_dim``, ``num_layers``, ``encoder_hidden_size``) and whether there
            is a projection.
        layers: the attention layers that get a prefix; without them the module still computes as PEFT's does.
    """

    def __init__(self, config: PrefixTuningConfig, layers: Sequence[AttentionLayer] = ()) -> None:
        super().__init__()
        assert config.token_dim
        self.layers = list(layers)
        self.after_text = config.placement == "infix"
        self.shifts_positions = config.shift_positions
        self.token_dropout = config.token_dropout
        width = sum(layer.width for layer in layers) or (config.num_layers or 0) * 2 * config.token_dim
        self.embedding, self.transform = _virtual_tokens(config, config.token_dim, width)

    def forward(self, prefix: Tensor | None = None) -> Tensor:
        """Flat keys and values [..., W] of virtual tokens [...]; [P, W] of all of them by default."""
        return _project(self.embedding, self.transform, prefix)

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, W] keys and values that the frozen base model computes for token ids [P]."""
        return flat_prefix(backbone, self.layers, input_ids)

    def start_from(self, flat: Tensor) -> None:
        """Initialize the parameters so that ``forward`` returns the prefix [P, W]."""
        _start_from(self.embedding, self.transform, flat)

    def limit_to(self, layers: Sequence[AttentionLayer], config: PrefixTuningConfig) -> None:
        """Give a prefix to these layers alone. The parameters are new ones, not yet initialized."""
        assert config.token_dim
        self.layers = list(layers)
        self.shifts_positions = config.shift_positions
        device = self.embedding.weight.device
        embedding, transform = _virtual_tokens(config, config.token_dim, sum(layer.width for layer in layers))
        self.embedding, self.transform = embedding.to(device), transform and transform.to(device)

    def prompt(self) -> Prompt:
        flat = self()
        return Prompt(
            num_virtual_tokens=len(flat),
            prefixes=split_prefix(flat, self.layers),
            after_text=self.after_text,
            shifts_positions=self.shifts_positions,
            token_dropout=self.token_dropout if self.training else 0.0,
        )

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self().detach()}


class EmbeddingPrefix(nn.Module):
    """The embedding-only ablation (paper, section 7.2): trained vectors [P, D] at the input, through the same MLP.

    Args:
        config: as for ``PrefixEncoder``; ``token_dim`` is D.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        assert config.token_dim
        self.after_text = config.placement == "infix"
        self.embedding, self.transform = _virtual_tokens(config, config.token_dim, config.token_dim)

    def forward(self) -> Tensor:
        """Virtual tokens [P, D]."""
        return _project(self.embedding, self.transform)

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, D] input embeddings of token ids [P]."""
        return init.word_vectors(backbone, input_ids)

    def start_from(self, vectors: Tensor) -> None:
        """Initialize the parameters so that ``forward`` returns the vectors [P, D]."""
        _start_from(self.embedding, self.transform, vectors)

    def prompt(self) -> Prompt:
        vectors = self()
        return Prompt(num_virtual_tokens=len(vectors), vectors=vectors, after_text=self.after_text)

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self().detach()}


def _virtual_tokens(config: PrefixTuningConfig, dim: int, width: int) -> tuple[nn.Embedding, nn.Sequential | None]:
    """An embedding [P, width] alone, or an embedding [P, dim] and the MLP that maps it to [P, width]."""
    if not config.prefix_projection or config.inference_mode:
        return nn.Embedding(config.num_virtual_tokens, width), None
    hidden = config.encoder_hidden_size or dim
    transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
    return nn.Embedding(config.num_virtual_tokens, dim), transform


def _project(embedding: nn.Embedding, transform: nn.Sequential | None, indices: Tensor | None = None) -> Tensor:
    vectors: Tensor = embedding.weight if indices is None else embedding(indices)
    return transform(vectors) if transform is not None else vectors


def _start_from(embedding: nn.Embedding, transform: nn.Sequential | None, states: Tensor) -> None:
    states = states.to(embedding.weight.device)
    if transform is None:
        embedding.weight.data.copy_(states)
    else:
        init.fit_last_layer(transform, embedding.weight, states)
