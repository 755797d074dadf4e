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

from softtune.backbone import AttentionLayer, Backbone, Site
from softtune.methods import initialization as init
from softtune.methods.base import OURS, PeftType, Probability, Prompt, PromptLearningConfig
from softtune.methods.kv_layout import Layers, choose_layers, flat_prefix, settle_prefix, split_prefix


@dataclass(kw_only=True, eq=False)
class PTuningV2Config(PromptLearningConfig):
    """Config of P-tuning v2. The prompt is initialized with the keys and values of common words."""

    peft_type: PeftType = PeftType.P_TUNING_V2
    learning_rate: ClassVar[float] = 1e-2
    prefix_dropout: Probability | None = field(default=None, metadata=OURS)
    """Dropout on the prefix's keys and values in training; by default the model's own hidden dropout."""
    layers: Layers = field(default=None, metadata=OURS)
    """Layers that get a prefix: their numbers, ``"first:N"`` or ``"last:N"``; by default all."""
    token_dropout: Probability = field(default=0.0, metadata=OURS)
    """Probability with which a row of a training batch does not see a virtual token (arXiv 2507.04221)."""
    sites: list[Site] | None = field(default=None, metadata=OURS)
    """Attention sites that get a prefix of their own: encoder, decoder, cross; by default all that the model has."""

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

    def initialize(self, module: DeepPrompt, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``."""
        module.start_from(module.states_of_words(init.vocabulary_ids(backbone, self.num_virtual_tokens), backbone))


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

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, W] keys and values that the frozen base model computes for token ids [P]."""
        return flat_prefix(backbone, self.layers, input_ids)

    def start_from(self, flat: Tensor) -> None:
        """Initialize the parameters with a prefix [P, W]."""
        self.embedding.weight.data.copy_(flat)

    def prompt(self) -> Prompt:
        flat = self.dropout(self.embedding.weight)
        return Prompt(
            num_virtual_tokens=len(flat),
            prefixes=split_prefix(flat, self.layers),
            token_dropout=self.token_dropout if self.training else 0.0,
        )

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self.embedding.weight.detach()}
