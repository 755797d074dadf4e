"""Attention in blocks against plain formulas in float64: outputs, gradients, and the calls that it leaves to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtune.backbone import blocked_attention as module
from softtune.backbone.blocked_attention import BLOCK, blocked_attention, takes_blocks

SHAPES = {
    "one head": (1, 1, 1, 5, 7, 4, 4),
    "groups of three heads": (3, 6, 2, 5, 9, 8, 8),
    "other values": (2, 4, 4, 3, 3, 8, 6),
    "one query": (4, 4, 2, 1, 11, 8, 8),
    "a whole block": (2, 2, 1, BLOCK, BLOCK, 4, 4),
    "one more": (2, 2, 1, BLOCK + 1, BLOCK + 4, 4, 4),
    "many blocks": (2, 4, 2, 3 * BLOCK + 5, 3 * BLOCK + 35, 8, 8),
}
"""Rows, query heads, key heads, queries, keys, sizes of a key and a value."""


def states(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, key_heads, queries, keys, size, width = SHAPES[name]
    torch.manual_seed(0)
    shapes = (rows, heads, queries, size), (rows, key_heads, keys, size), (rows, key_heads, keys, width)
    query, key, value = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def causal(name: str) -> Tensor:
    """Queries see all keys before the text, and those of the text up to their own."""
    *_, queries, keys, _, _ = SHAPES[name]
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def in_windows(name: str) -> Tensor:
    """Queries see five keys, and those of the first row not its first two."""
    rows, _, _, queries, keys, _, _ = SHAPES[name]
    mask = (causal(name) & causal(name).triu(keys - queries - 4)).repeat(rows, 1, 1, 1)
    mask[0, :, :, :2] &= ~mask[0, :, :, 2:].any(dim=-1, keepdim=True)
    return mask


def padded(name: str) -> Tensor:
    """All queries of a row see the same keys."""
    rows, *_, keys, _, _ = SHAPES[name]
    return (torch.arange(keys) >= torch.arange(rows)[:, None] % keys)[:, None, None]


def by_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("mask", [causal, in_windows, padded])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_those_of_the_formula(name: str, mask: Any) -> None:
    tensors, seen = states(name), mask(name)
    ours, expected = (attend(*tensors, seen, 0.3) for attend in (blocked_attention, by_formula))
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    found, right = (torch.autograd.grad((x * weights).sum(), tensors) for x in (ours, expected))
    for own, other in zip(found, right, strict=True):
        torch.testing.assert_close(own, other)


def test_scores_are_divided_by_the_root_of_the_key_size() -> None:
    tensors, mask = states("groups of three heads"), causal("groups of three heads")
    torch.testing.assert_close(blocked_attention(*tensors, mask, None), by_formula(*tensors, mask, 8**-0.5))


@pytest.mark.parametrize("name", ["groups of three heads", "many blocks"])
def test_bfloat16_is_off_by_its_own_rounding(name: str) -> None:
    tensors, mask = states(name, torch.bfloat16), causal(name)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    output, expected = (attend(*x, mask, 0.3) for attend, x in ((blocked_attention, tensors), (by_formula, exact)))
    weights = torch.randn_like(output)
    found = output, *torch.autograd.grad((output * weights).sum(), tensors)
    right = expected, *torch.autograd.grad((expected * weights).sum(), exact)
    for own, other in zip(found, right, strict=True):
        error = (own.double() - other).norm() / other.norm()
        assert float(error.detach()) < torch.finfo(torch.bfloat16).eps / 2


def test_a_query_that_sees_nothing_spoils_no_other() -> None:
    name = "many blocks"
    (query, key, value), mask = states(name), causal(name).clone()
    mask[:, :, BLOCK : 2 * BLOCK + 3] = False
    seeing = mask.any(dim=-1)[0, 0]
    output = blocked_attention(query, key, value, mask, 0.3)[:, seeing]
    expected = by_formula(query[:, :, seeing], key, value, mask[:, :, seeing], 0.3)
    torch.testing.assert_close(output, expected)
    found, right = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (output, expected))
    for own, other in zip(found, right, strict=True):
        torch.testing.assert_close(own, other)


def test_blocks_read_the_keys_that_they_see_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    weights = module._weights

    def counted(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
        read.append(key.shape[2])
        return weights(query, key, mask, scaling)

    monkeypatch.setattr(module, "_weights", counted)
    blocked_attention(*states("many blocks"), causal("many blocks"), 0.3)
    assert read == [BLOCK + 30, 2 * BLOCK + 30, 3 * BLOCK + 30, 3 * BLOCK + 35]


def test_other_calls_are_left_to_torch() -> None:
    module, (query, _, _) = nn.Identity().train(), states("groups of three heads")
    mask = causal("groups of three heads")
    assert takes_blocks(module, query, mask, {"dropout": 0.0, "position_bias": None})
    with torch.no_grad():  # as the first pass of reentrant checkpointing
        assert takes_blocks(module, query, mask, {})
    assert not takes_blocks(nn.Identity().eval(), query, mask, {})
    assert not takes_blocks(module, query, None, {})
    assert not takes_blocks(module, query, mask.double(), {})
    assert not takes_blocks(module, query, mask.expand(-1, 6, -1, -1), {})
    assert not takes_blocks(module, query, mask, {"dropout": 0.1})
    assert not takes_blocks(module, query, mask, {"position_bias": mask})
    assert not takes_blocks(module, query.to("meta"), mask, {})
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_blocks(module, query, mask, {})
