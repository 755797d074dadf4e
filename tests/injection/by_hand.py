"""Attention and masks written out in loops, to compare with. Nothing here uses softtune's code.

Letters: B rows, H key/value heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sees = Callable[[int, int, int], bool]
"""Whether a query sees a key, by the numbers of row, query and key."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, sees: Sees, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, heads, V] and weights [B, heads, T, S], one row, head and query at a time.

    Args:
        query: [B, heads, T, K]
        key: [B, H, S, K], of which several query heads share one.
        value: [B, H, S, V]
        sees: which queries see which keys. A query without any has zeros for its output.
        bias: [B, heads, T, S] added to the scores.
    """
    rows, heads, queries, size = query.shape
    group = heads // key.shape[1]
    outputs = query.new_zeros(rows, queries, heads, value.shape[-1])
    weights = query.new_zeros(rows, heads, queries, key.shape[2])
    for b in range(rows):
        for h in range(heads):
            for t in range(queries):
                seen = [s for s in range(key.shape[2]) if sees(b, t, s)]
                if not seen:
                    continue
                scores = [query[b, h, t] @ key[b, h // group, s] / size**0.5 for s in seen]
                if bias is not None:
                    scores = [score + bias[b, h, t, s] for score, s in zip(scores, seen, strict=True)]
                shares = torch.stack(scores).softmax(dim=0)
                parts = [share * value[b, h // group, s] for share, s in zip(shares, seen, strict=True)]
                outputs[b, t, h] = torch.stack(parts).sum(dim=0)
                weights[b, h, t, seen] = shares
    return outputs, weights


def dense_mask(sees: Sees, rows: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, S] a boolean mask, or an additive one in another dtype."""
    seen, hidden = (True, False) if dtype == torch.bool else (0.0, torch.finfo(dtype).min)
    numbers = [
        [[[seen if sees(b, t, s) else hidden for s in range(keys)] for t in range(queries)]] for b in range(rows)
    ]
    return torch.tensor(numbers, dtype=dtype)


def padding_mask(lengths: list[int], side: str) -> Tensor:
    """[B, S] the attention mask of texts of these lengths, with padding on the left, the right, both sides or none."""
    if side == "none":
        return torch.ones(len(lengths), max(lengths), dtype=torch.long)
    width = max(lengths) + (2 if side == "both" else 0)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        start = {"left": width - length, "right": 0, "both": 1}[side]
        row[start : start + length] = 1
    return mask


def causal(mask: Tensor, window: int | None = None) -> Sees:
    """What queries of a causal model see: real keys [B, S] up to themselves, at most ``window`` of them."""
    is_real = mask.tolist()

    def sees(row: int, query: int, key: int) -> bool:
        return bool(is_real[row][key]) and key <= query and (window is None or query - key < window)

    return sees
