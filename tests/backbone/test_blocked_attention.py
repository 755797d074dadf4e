"""Attention in blocks against plain formulas in float64: outputs, gradients, and the calls that it leaves to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from softtune import PrefixTuningConfig, get_peft_model
from softtune.backbone import blocked_attention as module
from softtune.backbone import interface
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


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float64).min, -torch.inf])
@pytest.mark.parametrize("name", ["groups of three heads", "many blocks"])
def test_a_mask_may_be_added_to_the_scores(name: str, hidden: float) -> None:
    tensors, seen = states(name), causal(name)
    biases = torch.randn(seen.shape, dtype=torch.float64)
    output = blocked_attention(*tensors, biases.masked_fill(~seen, hidden), 0.3)
    query, key, value = tensors
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * 0.3 + biases
    expected = (torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    found, right = (torch.autograd.grad(x.square().sum(), tensors) for x in (output, expected))
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


def test_a_query_whose_mask_hides_all_has_numbers() -> None:
    tensors, mask = states("groups of three heads"), torch.full((1, 1, 5, 9), -torch.inf, dtype=torch.float64)
    output = blocked_attention(*tensors, mask, 0.3)
    assert all(bool(x.isfinite().all()) for x in (output, *torch.autograd.grad(output.sum(), tensors)))


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
    (query, _, _), mask = states("groups of three heads"), causal("groups of three heads")
    assert takes_blocks(query, mask, {"dropout": 0.0, "position_bias": None})
    assert not takes_blocks(query, mask.expand(-1, 6, -1, -1), {})
    assert not takes_blocks(query, mask, {"dropout": 0.1})
    assert not takes_blocks(query, mask, {"position_bias": mask})
    assert not takes_blocks(query, mask, {"softcap": 5.0})
    assert not takes_blocks(query, torch.zeros(mask.shape, requires_grad=True), {})
    assert not takes_blocks(query.to("meta"), mask, {})
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_blocks(query, mask, {})


@pytest.mark.parametrize("in_training", [True, False])
def test_layers_take_blocks_in_training_alone(monkeypatch: pytest.MonkeyPatch, in_training: bool) -> None:
    calls, attend = [], interface.blocked_attention

    def noted(*args: Any) -> Tensor:
        calls.append(args)
        return attend(*args)

    monkeypatch.setattr(interface, "blocked_attention", noted)
    config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = get_peft_model(LlamaForCausalLM(config), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.train(in_training)(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert bool(calls) is in_training
