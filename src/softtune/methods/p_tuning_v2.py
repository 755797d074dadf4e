"""P-tuning v2: Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales
and Tasks", arXiv 2110.07602.

Deep prompts without a projection, with the model's hidden dropout on the keys and values, and a trained head in place
of a verbalizer. Without the dropout and the head it is prefix tuning with ``prefix_projection=False``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone
from softtune.methods import initialization as init
from softtune.methods.base import OURS, Probability
from softtune.methods.kv_config import KeyValueConfig
from softtune.methods.kv_layout import choose_layers, flat_prefix, settle_prefix, split_prefix
from softtune.methods.prompt import Prompt
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class PTuningV2Config(KeyValueConfig):
    """Config of P-tuning v2. By default, the prompt is initialized with the keys and values of common words.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    peft_type: PeftType = PeftType.P_TUNING_V2
    learning_rate: ClassVar[float] = 1e-2
    prefix_dropout: Probability | None = field(default=None, metadata=OURS)
    """Dropout on the prefix's keys and values in training; by default the model's own hidden dropout."""

    @property
    def trains_head(self) -> bool:
        """Always true: a head is trained wherever the model has one."""
        return True

    def build(self, backbone: Backbone) -> DeepPrompt:
        """See ``PeftConfig.build``.

        Raises:
            UnsupportedModelError: the base model has no layer that can take a prefix.
        """
        layers = choose_layers(backbone, self.layers, self.sites)
        settle_prefix(self, backbone)
        if self.prefix_dropout is None:
            self.prefix_dropout = backbone.hidden_dropout
        return DeepPrompt(self.num_virtual_tokens, layers, self.prefix_dropout, self.token_dropout)


class DeepPrompt(nn.Module):
    """The trained prompt: one row of keys and values [W] for each virtual token.

    Args:
        num_virtual_tokens: P.
        layers: the attention layers that get a prefix.
        dropout: dropout probability of the prefix's keys and values in training.
        token_dropout: probability with which a row of a training batch does not see a virtual token.
    """

    def __init__(
        self, num_virtual_tokens: int, layers: Sequence[AttentionLayer], dropout: float, token_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.embedding = nn.Embedding(num_virtual_tokens, sum(layer.width for layer in layers))
        self.dropout = nn.Dropout(dropout)
        self.token_dropout = token_dropout

    def forward(self) -> Tensor:
        """Flat keys and values [P, W], without dropout."""
        return self.embedding.weight

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, W] keys and values that the frozen base model computes for token ids [P]."""
        return flat_prefix(backbone, self.layers, input_ids)

    def start_from(self, flat: Tensor) -> None:
        """Initialize the parameters so that ``forward`` returns the prefix [P, W]."""
        self.embedding.weight.data.copy_(flat)

    def prompt(self) -> Prompt:
        flat = self.dropout(self())
        return Prompt(
            num_virtual_tokens=len(flat),
            prefixes=split_prefix(flat, self.layers),
            token_dropout=self.token_dropout if self.training else 0.0,
        )

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self.embedding.weight.detach()}
