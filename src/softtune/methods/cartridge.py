"""Cartridges: Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context representations via
self-study", arXiv 2506.06266.

A prefix that stands for a long text: it starts from the keys and values of the text's first tokens, and is trained to
answer as the model does with the whole text in its context. The first token, on which attention rests where it has
nothing to look at, stays as it is. Letters: P virtual tokens, F frozen ones among them, W values of one virtual token
over all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone
from softtune.errors import AdapterMismatchError, ConfigError
from softtune.methods import initialization as init
from softtune.methods.kv_config import PeftPrefixConfig
from softtune.methods.kv_layout import choose_layers, flat_prefix, settle_prefix, split_prefix
from softtune.methods.prompt import Prompt
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class CartridgeConfig(PeftPrefixConfig):
    """Config of a cartridge.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    peft_type: PeftType = PeftType.CARTRIDGE
    learning_rate: ClassVar[float] = 2e-2
    num_frozen_tokens: Annotated[int, Field(ge=0)] = 1
    """F, the number of first virtual tokens that stay as they start."""

    ways: ClassVar[tuple[str, ...]] = ("shift_positions",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens = {self.num_frozen_tokens} of {self.num_virtual_tokens} virtual tokens",
                "freeze at most all of them",
            )

    def build(self, backbone: Backbone) -> CartridgeEncoder:
        """See ``PeftConfig.build``.

        Raises:
            ConfigError: the base model has no such layer or site.
            UnsupportedModelError: the base model cannot take a prefix.
        """
        layers = choose_layers(backbone, self.layers, self.sites)
        settle_prefix(self, backbone)
        return CartridgeEncoder(self, layers)


class CartridgeEncoder(nn.Module):
    """The prefix, of which the last P - F tokens are trained.

    The frozen ones are a buffer, so that nothing that trains or freezes the module's parameters reaches them.

    Args:
        config: sizes (``num_virtual_tokens``, ``num_frozen_tokens``, ``token_dim``, ``num_layers``).
        layers: the attention layers that get a prefix; without them the module still computes as PEFT's does.
    """

    frozen_embedding: Tensor | None
    """[F, W]; None where F is 0."""
    trainable_embedding: nn.Parameter | None
    """[P - F, W]; None where F is P."""

    def __init__(self, config: CartridgeConfig, layers: Sequence[AttentionLayer] = ()) -> None:
        super().__init__()
        assert config.token_dim
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = config.num_virtual_tokens - config.num_frozen_tokens
        self.layers = list(layers)
        self.shifts_positions = config.shift_positions
        self.token_dropout = config.token_dropout
        width = sum(layer.width for layer in layers) or (config.num_layers or 0) * 2 * config.token_dim
        self._divide(torch.randn(config.num_virtual_tokens, width))

    def _divide(self, flat: Tensor) -> None:
        """Make the prefix [P, W] the module's own, in new tensors."""
        frozen, trainable = flat.split([self.num_frozen_tokens, self.num_trainable_tokens])
        self.register_buffer("frozen_embedding", frozen.clone() if len(frozen) else None)
        self.register_parameter("trainable_embedding", nn.Parameter(trainable.clone()) if len(trainable) else None)

    @property
    def weight(self) -> Tensor:
        """[P, W] the whole prefix."""
        parts = [part for part in (self.frozen_embedding, self.trainable_embedding) if part is not None]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forward(self, prefix_tokens: Tensor | None = None) -> Tensor:
        """Flat keys and values [..., W] of virtual tokens [...]; [P, W] of all of them by default."""
        return self.weight if prefix_tokens is None else self.weight[prefix_tokens]

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copy a prefix [P, W] into the frozen and the trained tokens.

        Raises:
            AdapterMismatchError: it has another shape.
        """
        own = self.weight
        if prompt_embeddings.shape != own.shape:
            raise AdapterMismatchError(
                f"prompt_embeddings has the shape {list(prompt_embeddings.shape)}, the cartridge {list(own.shape)}",
                "give a prefix of this base model, with as many virtual tokens",
            )
        parts = prompt_embeddings.split([self.num_frozen_tokens, self.num_trainable_tokens])
        for target, source in zip((self.frozen_embedding, self.trainable_embedding), parts, strict=True):
            if target is not None:
                target.data.copy_(source)

    def start_from(self, flat: Tensor) -> None:
        """Initialize the module so that ``forward`` returns the prefix [P, W]."""
        self.load_prompt_embeddings(flat)

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, W] keys and values that the frozen base model computes for token ids [P]."""
        return flat_prefix(backbone, self.layers, input_ids)

    def limit_to(self, layers: Sequence[AttentionLayer], config: CartridgeConfig) -> None:
        """Give a prefix to these layers alone. The tensors are new ones, not yet initialized."""
        self.layers = list(layers)
        self.shifts_positions = config.shift_positions
        self._divide(self.weight.new_empty(config.num_virtual_tokens, sum(layer.width for layer in layers)))

    def prompt(self) -> Prompt:
        flat = self()
        return Prompt(
            num_virtual_tokens=len(flat),
            prefixes=split_prefix(flat, self.layers),
            shifts_positions=self.shifts_positions,
            token_dropout=self.token_dropout if self.training else 0.0,
        )

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self.weight.detach()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_prompt_embeddings(state[init.PROMPT_KEY])
