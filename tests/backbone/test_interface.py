"""Attention is routed while a session runs; that of heads that share keys gives what transformers' own gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.families import FAMILIES, base_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from softtune.backbone import Backbone, model_session
from softtune.backbone.interface import WRAPPER, Attention, _wrapped, routed
from softtune.compat import attention_name, configs_of, has_interface, set_attention_name
from softtune.methods import TaskType

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


def names(model: PreTrainedModel) -> list[str | None]:
    return [attention_name(config) for config in configs_of(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_alone_renames_attention(family: str) -> None:
    model = base_model(family, FAMILIES[family].tasks[0])
    before = names(model)
    _ = Backbone(model).attention_layers
    assert names(model) == before
    with model_session(model):
        inside = names(model)
    assert names(model) == before
    if has_interface(model):
        assert all(name is None or name.startswith("softtune_") for name in inside)


def test_each_part_keeps_its_own_attention() -> None:
    model = base_model("t5", TaskType.SEQ_2_SEQ_LM)
    set_attention_name(model.encoder.config, "eager")
    before = names(model)
    assert {"eager", "sdpa"} <= {*before}
    with model_session(model):
        assert names(model) == [f"softtune_{name}" for name in before]
    assert names(model) == before


def test_blocks_that_overlap_end_in_any_order() -> None:
    model = base_model("llama", TaskType.CAUSAL_LM)
    first, second = routed(model), routed(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert names(model) == ["softtune_sdpa"]
    second.__exit__(None, None, None)
    assert names(model) == ["sdpa"]
