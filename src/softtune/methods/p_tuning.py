"""P-tuning: Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385.

Virtual tokens at the input, computed by an encoder so that they depend on one another; the encoder is dropped after
training. A template may put them at any position (see ``softtune.data.templates``); by default they precede the text.
Letters: P virtual tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.methods import initialization as init
from softtune.methods.base import OURS, PositiveInt, Probability, PromptLearningConfig
from softtune.methods.prompt import Prompt
from softtune.methods.prompt_tuning import settle_input
from softtune.peft_types import PeftType


class PromptEncoderReparameterizationType(str, Enum):
    """The encoder that computes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


_OF_THE_LSTM = {"encoder_num_layers": 2, "encoder_dropout": 0.0}
"""Fields of the LSTM, which the MLP does not use, and their defaults."""


@dataclass(kw_only=True, eq=False)
class PromptEncoderConfig(PromptLearningConfig):
    """Config of P-tuning.

    Raises:
        ConfigError: a value is out of range.
    """

    peft_type: PeftType = PeftType.P_TUNING
    learning_rate: ClassVar[float] = 3e-4
    takes_placed_tokens: ClassVar[bool] = True
    encoder_reparameterization_type: PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    """The encoder: three linear layers, or the paper's bidirectional LSTM and two linear layers."""
    encoder_hidden_size: PositiveInt | None = None
    """Width of the encoder's hidden layers; by default the embedding size."""
    encoder_num_layers: PositiveInt = 2
    """Number of layers of the LSTM; the MLP always has three."""
    encoder_dropout: Probability = 0.0
    """Dropout between the LSTM's layers."""
    init_file: str | None = field(default=None, metadata=OURS)
    """The adapter folder, hub name or safetensors file with the virtual tokens to start from: the encoder's last layer
    is fitted to them. By default the encoder's random output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP and not self.inference_mode:
            self._leave_out("for the LSTM, and left out: the MLP has no use for it", **_OF_THE_LSTM)

    def build(self, backbone: Backbone) -> PromptEncoder:
        """See ``PeftConfig.build``."""
        settle_input(self, backbone)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim
        return PromptEncoder(self)

    def initialize(self, module: PromptEncoder, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``.

        Raises:
            CheckpointError: the prompt of ``init_file`` is missing, damaged or of another shape.
            AdapterMismatchError: it is of another base model.
        """
        if self.init_file is not None:
            shape = self.num_virtual_tokens, backbone.embedding.embedding_dim
            module.start_from(init.from_file(self.init_file, shape, backbone))

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        return backbone.has_plain_words

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftConfig.implied_by_peft``: the MLP ignores the LSTM's fields."""
        return {} if values.get("encoder_reparameterization_type") == "LSTM" else _OF_THE_LSTM


class PromptEncoder(nn.Module):
    """The trained virtual tokens and their encoder.

    Args:
        config: ``num_virtual_tokens``, ``token_dim``, the ``encoder_*`` fields; in inference mode there is no encoder.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        assert config.token_dim
        dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(config.num_virtual_tokens, dim)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                input_size=dim,
                hidden_size=hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Vectors [..., P, D] of virtual tokens [..., P]; [P, D] of all of them by default."""
        vectors: Tensor = self.embedding.weight if indices is None else self.embedding(indices)
        encoded = self._encoded(vectors)
        return self.mlp_head(encoded) if self.mlp_head is not None else encoded

    def _encoded(self, vectors: Tensor) -> Tensor:
        """What the linear layers read: the vectors, or the LSTM's output."""
        return vectors if self.lstm_head is None else self.lstm_head(vectors)[0]

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, D] input embeddings of token ids [P]."""
        return init.word_vectors(backbone, input_ids)

    def start_from(self, vectors: Tensor) -> None:
        """Initialize the parameters so that ``forward`` returns the vectors [P, D]."""
        vectors = vectors.to(self.embedding.weight.device)
        if self.mlp_head is None:
            self.embedding.weight.data.copy_(vectors)
        else:
            init.fit_last_layer(self.mlp_head, self._encoded(self.embedding.weight), vectors)

    def prompt(self) -> Prompt:
        vectors = self()
        return Prompt(num_virtual_tokens=len(vectors), vectors=vectors)

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self().detach()}
