"""What softtune sees in a base model: sites, layers and their sizes, biases by role, heads."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tests.families import CAUSAL_LM, FAMILIES, SEQ_2_SEQ_LM, SEQ_CLS, base_model, head_names
from transformers import AlbertConfig, AlbertForSequenceClassification

from softtune.backbone import Backbone, Site
from softtune.backbone.roles import ROLES
from softtune.errors import UnsupportedModelError


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_layers(family: str) -> None:
    row = FAMILIES[family]
    model = base_model(family, row.tasks[0])
    layers = Backbone(model).attention_layers
    expected = [(site, i, *sizes) for site in row.attention for i, (_, sizes) in enumerate(row.layers(site))]
    assert [(a.site.value, a.index, a.heads, a.key_size, a.value_size) for a in layers] == expected
    for layer, (path, _) in zip(layers, row.layers(), strict=True):
        assert layer.module is (model.base_model.get_submodule(path) if path else None)
    assert all(a.is_cached for a in layers) == row.plain_cache


def test_layers_that_share_a_module_share_a_prefix() -> None:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "embedding_size": 16,
        "vocab_size": 50,
    }
    model = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=3, num_hidden_groups=1, **sizes))
    assert [(a.site, a.heads) for a in Backbone(model).attention_layers] == [(Site.ENCODER, 4)]


def test_a_fault_of_the_look_is_not_laid_at_the_models_door(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("llama", CAUSAL_LM)
    fault = KeyError("keys")
    monkeypatch.setattr("softtune.backbone.interface.AttentionRecorder.__call__", Mock(side_effect=fault))
    with pytest.raises(KeyError) as raised:
        _ = Backbone(model).attention_layers
    assert raised.value is fault
    monkeypatch.setattr(type(model.base_model), "forward", Mock(side_effect=ValueError("no pictures")))
    with pytest.raises(UnsupportedModelError, match=r"does not run on token ids alone \(no pictures\)"):
        _ = Backbone(model).attention_layers


def test_looking_does_not_change_the_model() -> None:
    for family, row in FAMILIES.items():
        model, other = base_model(family, row.tasks[0]), base_model(family, row.tasks[0])
        _ = Backbone(model).attention_layers
        assert not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, row in FAMILIES.items() for t in row.tasks])
def test_heads(family: str, task: str) -> None:
    assert set(Backbone(base_model(family, task)).head_names) == {n.split(".")[0] for n in head_names(family, task)}


def test_bert_biases_by_role() -> None:
    roles = {slot.module: slot.role for slot in Backbone(base_model("bert", SEQ_CLS)).bias_slots()}
    layer = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention_output",
        "attention.output.LayerNorm": "layer_norm",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
        "output.LayerNorm": "layer_norm",
    }
    expected = {f"bert.encoder.layer.{i}.{name}": role for i in (0, 1) for name, role in layer.items()}
    assert roles == expected | {"bert.embeddings.LayerNorm": "layer_norm", "bert.pooler.dense": None}


def test_gpt2_biases_by_role() -> None:
    slots = {slot.name: slot for slot in Backbone(base_model("gpt2", CAUSAL_LM)).bias_slots()}
    layer = {
        "ln_1": "layer_norm",
        "attn.c_attn.query": "query",
        "attn.c_attn.key": "key",
        "attn.c_attn.value": "value",
        "attn.c_proj": "attention_output",
        "ln_2": "layer_norm",
        "mlp.c_fc": "intermediate",
        "mlp.c_proj": "output",
    }
    expected = {f"transformer.h.{i}.{name}": role for i in (0, 1) for name, role in layer.items()}
    assert {name: slot.role for name, slot in slots.items()} == expected | {"transformer.ln_f": "layer_norm"}
    for number, role in enumerate(("query", "key", "value")):
        slot = slots[f"transformer.h.0.attn.c_attn.{role}"]
        assert slot.module == "transformer.h.0.attn.c_attn"
        assert slot.width == 36
        assert slot.index is not None
        assert slot.index.tolist() == list(range(36 * number, 36 * (number + 1)))


def test_bloom_interleaves_query_key_and_value() -> None:
    """Head after head, and within a head query, key, value."""
    slots = {slot.name: slot for slot in Backbone(base_model("bloom", CAUSAL_LM)).bias_slots()}
    index = slots["transformer.h.0.self_attention.query_key_value.key"].index
    assert index is not None
    assert index.tolist() == [head * 24 + 8 + i for head in range(4) for i in range(8)]


@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("bart", SEQ_2_SEQ_LM)])
def test_every_role_is_found(family: str, task: str) -> None:
    slots = Backbone(base_model(family, task)).bias_slots()
    assert {slot.role for slot in slots} - {None} == set(ROLES)
    assert all(slot.has_bias == FAMILIES[family].has_biases for slot in slots)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions(family: str) -> None:
    backbone = Backbone(base_model(family, FAMILIES[family].tasks[0]))
    assert [stack.table_size for stack in backbone.stacks] == [FAMILIES[family].limit] * len(backbone.stacks)
