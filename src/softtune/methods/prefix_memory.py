"""PrefixMemory-Tuning: Wang et al. 2025, "PrefixMemory-Tuning: Modernizing Prefix-Tuning by Decoupling the Prefix from
Attention", arXiv 2506.13674.

A prefix shares the softmax of a layer with the text, so that it loses weight as the text grows. Here a matrix M takes
its place outside of the softmax: φ(q)·M is added to each head's output, with φ = elu (paper, section 4). It has no
tokens, no columns of the mask and no entries of the cache. M starts at zero, and with it the outputs of the base model.
Letters: Q query heads, H key/value heads, K and V sizes of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone, Place, Site
from softtune.methods.base import OURS, PeftConfig
from softtune.methods.kv_layout import Layers, check_wrapper, choose_layers
from softtune.methods.prompt import Prompt
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class PrefixMemoryConfig(PeftConfig):
    """Config of PrefixMemory-Tuning."""

    peft_type: PeftType = PeftType.PREFIX_MEMORY
    learning_rate: ClassVar[float] = 1e-3
    is_prompt_learning: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = ("share_heads",)
    layers: Layers = field(default=None, metadata=OURS)
    """Layers that get a memory: their numbers, ``"first:N"`` or ``"last:N"``; by default all."""
    sites: list[Site] | None = field(default=None, metadata=OURS)
    """Attention sites that get memories of their own: encoder, decoder, cross; by default all that the model has."""
    share_heads: bool = field(default=False, metadata=OURS)
    """Whether query heads that share a key/value head share a matrix too: H of them in a layer instead of Q."""

    def build(self, backbone: Backbone) -> PrefixMemory:
        """See ``PeftConfig.build``.

        Raises:
            ConfigError: the base model has no such layer or site.
            UnsupportedModelError: nothing can be added to the outputs of its attention.
        """
        layers = choose_layers(backbone, self.layers, self.sites)
        check_wrapper(backbone)
        return PrefixMemory(layers, share_heads=self.share_heads)


class PrefixMemory(nn.Module):
    """The trained memories, which start at zero.

    Args:
        layers: the attention layers that get one.
        share_heads: as in ``PrefixMemoryConfig``.
    """

    def __init__(self, layers: Sequence[AttentionLayer], *, share_heads: bool) -> None:
        super().__init__()
        self.places = [layer.place for layer in layers]
        shapes = {a.place: (a.heads if share_heads else a.query_heads, a.key_size, a.value_size) for a in layers}
        self.memories = nn.ParameterDict({_key(p): nn.Parameter(torch.zeros(shapes[p])) for p in self.places})

    def prompt(self) -> Prompt:
        return Prompt(memories={place: self.memories[_key(place)] for place in self.places})

    def inference_state(self) -> dict[str, Tensor]:
        return {f"memory.{_key(place)}": self.memories[_key(place)].detach() for place in self.places}


def _key(place: Place) -> str:
    """A layer's key in ``memories``: ParameterDict allows no dots in its keys."""
    site, index = place
    return f"{site.value}_{index}"
