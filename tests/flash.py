"""The contract of flash attention's kernels in plain torch, and its place in transformers.

So transformers' own way to the kernels runs on any machine: unpadding, packed rows, windows. As in the kernels, the
last query stands at the last key. Letters: B rows, T queries, S keys, N of all rows' queries or keys, H heads, K size
of a key.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """[B, T, H, K] of queries [B, T, H, K], keys and values [B, S, H or less, K]."""
    assert dropout_p == softcap == 0
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    seen = _seen(q.shape[1], k.shape[1], causal, window_size).to(q.device)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num()
    return torch.einsum("bhts,bshk->bthk", weights, v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """[N, H, K] for rows of any length, one behind the other."""
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    rows = [
        flash_attn_func(a[None], b[None], c[None], dropout_p, softmax_scale, causal, window_size, softcap)[0]
        for a, b, c in zip(_rows(q, cu_seqlens_q), _rows(k, cu_seqlens_k), _rows(v, cu_seqlens_k), strict=True)
    ]
    return torch.cat(rows)


def _rows(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return x.split(ends.diff().tolist())


def _seen(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """[T, S]"""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    left, right = window[0], 0 if causal else window[1]
    seen = distance <= left if left >= 0 else torch.ones_like(distance, dtype=torch.bool)
    return seen & (-distance <= right) if right >= 0 else seen


def install(patch: pytest.MonkeyPatch) -> None:
    """Let transformers find these functions where it looks for a package with kernels."""

    def found(implementation: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        assert implementation in ("flash_attention_2", "flash_attention_3", "some/kernels")
        return flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input

    patch.setattr(utils, "_lazy_imports", found)
    patch.setattr(utils, "_loaded_implementation", None)
