"""The one injection point: an attention function registered with transformers that lets a wrapper step in.

A model's attention layers call the function named in their config. ``install`` renames ``sdpa`` to ``softtune_sdpa``
(and so on for every implementation); the function of that name calls the stock one, or hands it to the wrapper that
came down the forward's keyword arguments. Keyword arguments, not module state, because gradient checkpointing runs the
layers again during the backward pass. Knows nothing about prefixes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softtune.errors import UnsupportedModelError

WRAPPER = "softtune_attention"
"""The keyword argument of a stack's forward that carries the wrapper down to the attention layers."""

_PREFIX = "softtune_"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionWrapper(Protocol):
    """Stands between an attention layer and the stock attention function."""

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]: ...


def install(model: nn.Module) -> None:
    """Route the model's attention through softtune. Without a wrapper the outputs stay the same to the last bit.

    Encoder-decoders keep copies of the config for each stack, so every module's config is visited.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        stock = getattr(config, "_attn_implementation", None)
        if stock and not stock.startswith(_PREFIX):
            config._attn_implementation = _register(stock)


def _register(stock: str) -> str:
    name = _PREFIX + stock
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _wrapped(None if stock == "eager" else ALL_ATTENTION_FUNCTIONS[stock]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    return name


def _wrapped(stock: Attention | None) -> Attention:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        wrapper: AttentionWrapper | None = kwargs.pop(WRAPPER, None)
        if wrapper and stock is not None and stock is not ALL_ATTENTION_FUNCTIONS["sdpa"]:
            raise UnsupportedModelError(
                "prefixes need the attention implementations sdpa or eager: call set_attn_implementation('sdpa') first"
            )
        # Each model file has an eager function of its own, with the model's soft caps and sinks.
        attend: Attention = stock or sys.modules[type(module).__module__].eager_attention_forward
        return wrapper(attend, module, *args, **kwargs) if wrapper else attend(module, *args, **kwargs)

    return attention


class AttentionRecorder:
    """A wrapper that notes every call's module, key and value, and changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor, bool]] = []
        """Module, key [B, H, S, K], value [B, H, S, V], and whether the keys come from another sequence."""

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.calls.append((module, key, value, query.shape[-2] != key.shape[-2]))
        return attend(module, query, key, value, attention_mask, **kwargs)
