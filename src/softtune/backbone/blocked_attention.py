"""Exact attention for training on a CPU, by plain matrix products over blocks of queries.

torch's fused attention takes longer in bfloat16 there than in float32 for the backward pass, and reads all keys that
a mask allows any query. Here each block of queries reads the keys that it sees alone, and its probabilities are
computed again for the backward pass, as in FlashAttention (Dao et al. 2022, section 3.1), so that they take no memory
between the passes. Scores and their softmax are float32 for all smaller types.

Letters: B rows, Q query heads, H key/value heads, T queries, S keys, K and V sizes of a key and a value, G queries of
all heads that share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries of a block, of each head."""
HIDDEN = -1e30
"""A key is hidden from a query where its mask adds no more than this to the score."""


def takes_blocks(query: Tensor, mask: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether attention can be computed here: on a CPU, with a mask that is the same for all heads and not trained,
    without dropout, position bias, a cap of the scores, autocast and compilation."""
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    others = not arguments.get("dropout"), arguments.get("position_bias") is None, arguments.get("softcap") is None
    return all(others) and mask.shape[1] == 1 and not mask.requires_grad


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[B, T, Q, V] the attention outputs.

    Args:
        query: [B, Q, T, K].
        key: [B, H, S, K].
        value: [B, H, S, V].
        mask: [B or 1, 1, T or 1, S] which keys a query sees, or what is added to its scores. A query that sees none
            gets a mean of some values.
        scaling: the factor of the scores; by default 1 / sqrt(K).
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = mask.expand(-1, -1, query.shape[2], -1)
    output: Tensor = _BlockedAttention.apply(query, key, value, mask, factor)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for queries, keys in _blocks(mask):
            weights = _weights(query[:, :, queries], key[:, :, keys], mask[:, :, queries, keys], scaling)
            output[:, :, queries] = by_head(weights.to(value.dtype) @ value[:, :, keys], query.shape[1])
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (x.new_zeros(x.shape, dtype=_exact(x)) for x in (key, value))
        for queries, keys in _blocks(mask):
            some, seen = query[:, :, queries], key[:, :, keys]
            weights = _weights(some, seen, mask[:, :, queries, keys], ctx.scaling)
            own = by_head(gradient[:, :, queries], key.shape[1])
            of_value[:, :, keys] += weights.to(value.dtype).transpose(-1, -2) @ own
            of_weights = (own @ value[:, :, keys].transpose(-1, -2)).to(weights.dtype)
            of_weights -= (of_weights * weights).sum(dim=-1, keepdim=True)
            of_scores = of_weights.mul_(weights).to(key.dtype)
            of_query[:, :, queries] = by_head(of_scores @ seen, query.shape[1])
            of_key[:, :, keys] += of_scores.transpose(-1, -2) @ by_head(some, key.shape[1])
        of_key *= ctx.scaling
        return of_query.mul_(ctx.scaling), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _blocks(mask: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys from the first to the last that one of them sees."""
    length, keys = mask.shape[2:]
    if length <= BLOCK:
        yield slice(length), slice(keys)
        return
    for start in range(0, length, BLOCK):
        queries = slice(start, start + BLOCK)
        own = mask[:, :, queries].flatten(0, 2)
        seen = (own if own.dtype is torch.bool else own > HIDDEN).any(dim=0).nonzero().flatten()
        yield queries, slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(1)


def _weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[B, H, G, S] the probabilities of a block."""
    exact = _exact(query)
    queries, keys = by_head(query, key.shape[1]).to(exact), key.to(exact).transpose(-1, -2)
    least = torch.finfo(exact).min
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=exact).masked_fill_(~mask, least)
    else:
        mask = mask.to(exact).clamp(min=least)
    shape = len(key), key.shape[1], query.shape[1] // key.shape[1], -1, -1
    scores = mask[:, :, None].expand(shape).contiguous().view(-1, queries.shape[2], keys.shape[3])
    scores.baddbmm_(queries.flatten(0, 1), keys.flatten(0, 1), alpha=scaling)
    return torch.softmax(scores, dim=-1).view(*queries.shape[:3], -1)


def _exact(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def by_head(states: Tensor, heads: int) -> Tensor:
    """[B, heads, G, K] the states [B, H, T, K] of all heads of a group as those of one head, or of one head as those of
    its group's."""
    return states.reshape(len(states), heads, -1, states.shape[-1])
