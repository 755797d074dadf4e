"""Prefix tuning: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

Every attention layer gets P trained keys and values in front of its own. Letters: P virtual tokens, L layers, H
key/value heads, K key size, D hidden size, W values of one virtual token over all layers (L·2·H·K where all layers
have the same sizes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone
from softtune.errors import ConfigError, UnsupportedModelError
from softtune.methods import initialization as init
from softtune.methods.base import OURS, PositiveInt
from softtune.methods.kv_config import PeftPrefixConfig, Start
from softtune.methods.kv_layout import choose_layers, flat_prefix, settle_prefix, split_prefix
from softtune.methods.prompt import Prompt
from softtune.methods.prompt_tuning import check_vectors
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class PrefixTuningConfig(PeftPrefixConfig):
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
    init_weights: Start | None = None
    """Initialize from N(0, 1), with zeros, with the keys and values of common words or of ``init_text``, or with the
    prefix in ``init_file``. By default: the text or file if given, else common words; with a projection and neither,
    the projection's random output. PEFT's default is random."""
    placement: Literal["prefix", "infix"] = field(default="prefix", metadata=OURS)
    """Before the text, or between the text and the answer (the paper's infix; decoders only)."""
    embedding_only: bool = field(default=False, metadata=OURS)
    """Train vectors at the input layer only and let the layers propagate them (the paper's ablation)."""

    ways: ClassVar[tuple[str, ...]] = ("placement", "embedding_only", "shift_positions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_only and (self.layers or self.sites):
            raise ConfigError("embedding_only trains no layer", "drop layers and sites")
        if self.embedding_only and not self.shift_positions:
            raise ConfigError("embedding_only has its virtual tokens among the words", "drop shift_positions")
        if self.embedding_only and self.token_dropout:
            raise ConfigError("embedding_only has its virtual tokens among the words", "drop token_dropout")
        if self.inference_mode:
            return  # a saved config keeps its values, and one of PEFT's also those without effect
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

    @property
    def default_start(self) -> Start:
        """See ``KeyValueConfig.default_start``."""
        return "random" if self.prefix_projection else "vocabulary"

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        plain = self.placement == "prefix" and not self.embedding_only
        return plain and super().is_readable_by_peft(backbone)

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftPrefixConfig.implied_by_peft``. Without a projection there is no hidden layer."""
        implied = super().implied_by_peft(values)
        return implied if values.get("prefix_projection") else {**implied, "encoder_hidden_size": None}


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
