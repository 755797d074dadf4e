"""The one injection point: attention functions registered with transformers that can call a wrapper.

A model's attention layers call the function named in their config. Where a model's attention is routed, ``sdpa`` is
renamed to ``softtune_sdpa`` (and so on for every implementation). The function of that name calls the stock one, or
passes it to the wrapper in the forward's keyword arguments. Keyword arguments, not module state, because gradient
checkpointing recomputes the layers in the backward pass. Knows nothing about prefixes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from softtune import compat
from softtune.backbone.blocked_attention import blocked_attention, takes_blocks
from softtune.compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)
from softtune.errors import UnsupportedModelError

WRAPPER = "softtune_attention"
"""The keyword argument of a stack's forward that carries the wrapper down to the attention layers."""

IN_TRAINING = "softtune_in_training"
"""The keyword argument that says whether the call trains, which holds when its layers are recomputed later too."""

_PREFIX = "softtune_"

_UNGROUPED = nn.Identity()
"""A module whose key/value heads are not repeated."""

Function = Callable[..., tuple[Tensor, Tensor | None]]
Mask = Tensor | BlockMask | None


class _Name(str):
    """softtune's name for an attention function. It also equals the stock name, since some models branch on that. It is
    copied and pickled as the stock name."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.removeprefix(_PREFIX) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.removeprefix(_PREFIX),)


class MaskForm(Enum):
    """The form of attention mask that an attention function takes."""

    DENSE = "sdpa"
    """The keys that each query attends to [B, 1, T, S]; None for all of them, or for those of a causal model."""
    PADDING = "flash_attention_2"
    """The keys that are not padding [B, S]; None for all of them. Causality and windows are arguments."""
    BLOCKS = "flex_attention"
    """A ``BlockMask``, made from a function of row, head, query and key."""


@dataclass(frozen=True)
class Attention:
    """A stock attention function."""

    function: Function
    form: MaskForm

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.function(*args, **kwargs)


class AttentionWrapper(Protocol):
    """Called by an attention layer in place of the stock attention function, which it receives as ``attend``."""

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]: ...


def register(stock: str) -> str:
    """Register softtune's function for a stock attention function with transformers, and return its name.

    Raises:
        UnsupportedModelError: the stock function has no mask function.
    """
    name = _Name(_PREFIX + stock)
    if name not in ALL_ATTENTION_FUNCTIONS:
        if stock not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedModelError(
                f"the attention implementation {stock} has no mask function",
                "load the model with attn_implementation='sdpa'",
            )
        AttentionInterface.register(name, _wrapped(stock))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    return name


def _wrapped(stock: str) -> Function:
    form = _form(stock)
    function = None if stock == "eager" else ALL_ATTENTION_FUNCTIONS[stock]
    if function is not None and form is MaskForm.PADDING:
        function = _named(function, stock)
    sharing = in_blocks = function
    if function is not None and stock == "sdpa":
        sharing = _sharing(function)
        in_blocks = _in_blocks(sharing)

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        wrapper: AttentionWrapper | None = kwargs.pop(WRAPPER, None)
        wrapped = in_blocks if kwargs.pop(IN_TRAINING, False) else sharing
        attend: Function = function or compat.eager_function(module)
        if wrapper is None:
            return attend(module, *args, **kwargs)
        if form is None:
            raise UnsupportedModelError(
                f"no prefix goes with the attention implementation {stock}",
                "load the model with attn_implementation='sdpa'",
            )
        return wrapper(Attention(wrapped or attend, form), module, *args, **kwargs)

    return attention


def _sharing(sdpa: Function) -> Function:
    """Compute grouped-query attention with a mask without repeating keys and values for each query head.

    transformers repeats them there. Here the query heads of a group become queries of one head.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        (rows, heads, queries, _), kv_heads = query.shape, key.shape[1]
        if heads == kv_heads or mask is None or mask.shape[1] > 1 or kwargs.get("position_bias") is not None:
            return sdpa(module, query, key, value, mask, **kwargs)
        folded = query.reshape(rows, kv_heads, -1, query.shape[-1])
        repeated = mask.expand(-1, -1, queries, -1).repeat(1, 1, heads // kv_heads, 1)
        output, _ = sdpa(_UNGROUPED, folded, key, value, repeated, **kwargs)
        return output.unflatten(1, (-1, queries)).permute(0, 2, 3, 1, 4).flatten(2, 3), None

    return attention


def _in_blocks(sharing: Function) -> Function:
    """Compute attention in blocks of queries, where that can be."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if mask is None or not takes_blocks(query, mask, kwargs):
            return sharing(module, query, key, value, mask, **kwargs)
        return blocked_attention(query, key, value, mask, kwargs.get("scaling")), None

    return attention


def _named(flash: Function, stock: str) -> Function:
    """Call flash attention with the stock name in the layer's config, by which it looks up its kernels."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        config = _Instead(module.config, **compat.with_attention_name(stock))
        return flash(_Instead(module, config=config), *args, **kwargs)

    return attention


class _Instead:
    """A proxy of an object with some of its attributes replaced."""

    def __init__(self, original: Any, **values: Any) -> None:
        self.__dict__.update(values, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def _form(stock: str) -> MaskForm | None:
    """The mask form of a stock attention function; None where it is unknown.

    Functions are compared, not names: kernels from the hub have other names for flash attention's function.
    """
    if stock == "eager":
        return MaskForm.DENSE
    return next((f for f in MaskForm if ALL_ATTENTION_FUNCTIONS[stock] is ALL_ATTENTION_FUNCTIONS[f.value]), None)


def stock_name(config: Any) -> str | None:
    """The name of the stock attention function in a config; None where it has none."""
    name = compat.attention_name(config)
    return name and name.removeprefix(_PREFIX)


def is_routed(config: Any) -> bool:
    """Whether the attention function in a config is softtune's."""
    return isinstance(compat.attention_name(config), _Name)


def takes_padding(config: Any) -> bool:
    """Whether attention takes a padding mask only."""
    return _form(stock_name(config) or "eager") is MaskForm.PADDING


def takes_any_mask(config: Any) -> bool:
    """Whether attention takes a dense mask of the keys that each query attends to."""
    return _form(stock_name(config) or "eager") is MaskForm.DENSE


def flash_refusal(reason: str) -> UnsupportedModelError:
    """The error for something that flash attention does not support."""
    return UnsupportedModelError(
        f"flash attention {reason}", "load the model with attn_implementation='sdpa' or 'eager'"
    )


class AttentionRecorder:
    """A wrapper that records every call's module, key and value, and changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor, bool, int]] = []
        """Module, key [B, H, S, K], value [B, H, S, V], whether the keys come from another sequence, and the number of
        query heads."""

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.calls.append((module, key, value, query.shape[-2] != key.shape[-2], query.shape[1]))
        return attend(module, query, key, value, attention_mask, **kwargs)
