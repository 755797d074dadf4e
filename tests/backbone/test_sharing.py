"""Facts of a base model are observed once, for all who ask."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tests.families import base_model
from torch import nn

from softtune import PeftModel, PrefixTuningConfig
from softtune.backbone import Backbone
from softtune.methods import TaskType

CAUSAL_LM = TaskType.CAUSAL_LM


def test_models_over_one_base_observe_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls = base_model("llama", CAUSAL_LM), []
    base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = PeftModel(base, PrefixTuningConfig(num_virtual_tokens=2, task_type=CAUSAL_LM, init_weights="random"))
    seen = len(calls)
    assert seen
    others = [PeftModel(base) for _ in range(4)]
    assert all(other.backbone is first.backbone for other in others)
    for other in others:
        _ = other.backbone.attention_layers
    assert len(calls) == seen


def test_another_module_is_looked_at_anew() -> None:
    base = base_model("llama", CAUSAL_LM)
    before = Backbone.shared(base)
    layer = base.model.layers[0]
    layer.self_attn, replaced = type(layer.self_attn)(base.config, 0), layer.self_attn
    after = Backbone.shared(base)
    assert after is not before
    assert after.attention_layers[0].module is layer.self_attn
    assert before.attention_layers[1].module is after.attention_layers[1].module
    assert replaced is not layer.self_attn


def test_a_module_beside_the_others_is_seen() -> None:
    base = base_model("llama", CAUSAL_LM)
    before = Backbone.shared(base)
    base.add_module("value_head", nn.Linear(base.config.hidden_size, 1))
    assert "value_head" in Backbone.shared(base).head_names
    assert Backbone.shared(base) is not before


def test_nothing_keeps_a_model_that_nobody_uses() -> None:
    base = base_model("gpt2", CAUSAL_LM)
    backbone, model = Backbone.shared(base), weakref.ref(base)
    assert len(backbone.attention_layers) == len(base.transformer.h)
    del base, backbone
    gc.collect()
    assert model() is None


@torch.no_grad()
def test_what_is_shared_does_not_share_adapters() -> None:
    base, ids = base_model("llama", CAUSAL_LM), torch.tensor([[5, 6, 7]])
    expected = base(ids).logits
    one, other = PeftModel(base), PeftModel(base, PrefixTuningConfig(num_virtual_tokens=2, task_type=CAUSAL_LM))
    torch.nn.init.normal_(next(p for p in other.parameters() if p.requires_grad))
    assert torch.equal(one(ids).logits, expected)
    assert not torch.equal(other(ids).logits, expected)
