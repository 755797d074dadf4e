"""Attention of heads that share keys gives what transformers' own gives, which copies the keys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from softtune.backbone.interface import WRAPPER, Attention, _wrapped

KEYS = 7


def attend(*tensors: Tensor | None, shared: int, wrapped: bool, **kwargs: object) -> Tensor:
    """Through a wrapper that changes nothing, or by transformers alone."""

    def wrapper(attention: Attention, *args: object, **own: object) -> tuple[Tensor, Tensor | None]:
        return attention(*args, **own)

    module = SimpleNamespace(num_key_value_groups=shared, is_causal=True)
    if wrapped:
        return _wrapped("sdpa")(module, *tensors, **{WRAPPER: wrapper}, **kwargs)[0]
    return sdpa_attention_forward(module, *tensors, **kwargs)[0]


def masks(rows: int, queries: int) -> dict[str, Tensor | None]:
    seen = torch.rand(rows, 1, queries, KEYS) > 0.4
    seen[..., 0] = True
    return {
        "none": None,
        "seen": seen,
        "one for all queries": seen[:, :, :1],
        "one for all rows": seen[:1],
        "added": torch.zeros(seen.shape).masked_fill(~seen, float("-inf")),
        "by head": seen.expand(-1, 6, -1, -1),
    }


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("queries", [1, 2, KEYS])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_shared_keys(heads: int, queries: int, kind: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, queries, 6, 8).transpose(1, 2)
    key, value = torch.randn(3, heads, KEYS, 8), torch.randn(3, heads, KEYS, 5)
    mask = masks(3, queries)[kind]
    results = []
    for wrapped in (True, False):
        own = [states.detach().clone().requires_grad_() for states in (query, key, value)]
        output = attend(*own, mask, shared=6 // heads, wrapped=wrapped, scaling=0.3)
        results.append([output, *torch.autograd.grad(output.square().sum(), own)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_position_bias_is_by_head() -> None:
    query, key = torch.randn(2, 6, 3, 8), torch.randn(2, 2, KEYS, 8)
    mask, bias = masks(2, 3)["added"], torch.randn(1, 6, 3, KEYS)
    ours, theirs = (attend(query, key, key, mask, shared=3, wrapped=w, position_bias=bias) for w in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
