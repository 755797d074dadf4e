"""What softtune sees in a base model: sites, layers and their sizes, biases by role, heads."""

from __future__ import annotations

import pytest
import torch
from tests.families import CAUSAL_LM, FAMILIES, SEQ_2_SEQ_LM, SEQ_CLS, base_model
from transformers import AlbertConfig, AlbertForSequenceClassification

from softtune.backbone import Backbone, Site
from softtune.backbone.roles import ROLES

LAYERS = {  # site: (layers, heads, key size)
    "gpt2": {"decoder": (2, 6, 6)},
    "llama": {"decoder": (2, 2, 8)},
    "qwen3": {"decoder": (2, 2, 12)},
    "gemma3": {"decoder": (3, 2, 8)},
    "bloom": {"decoder": (2, 4, 8)},
    "bert": {"encoder": (2, 4, 8)},
    "t5": {"encoder": (3, 4, 12), "decoder": (2, 4, 12), "cross": (2, 4, 12)},
    "bart": {"encoder": (2, 4, 8), "decoder": (3, 2, 16), "cross": (3, 2, 16)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_layers(family: str) -> None:
    model = base_model(family, FAMILIES[family].tasks[0])
    layers = Backbone(model).attention_layers
    expected = [(site, i, heads, size) for site, (count, heads, size) in LAYERS[family].items() for i in range(count)]
    assert [(a.site.value, a.index, a.heads, a.key_size) for a in layers] == expected
    assert all(a.value_size == a.key_size for a in layers)
    paths = FAMILIES[family].attention
    for layer in layers:
        own = model.base_model.get_submodule(paths[layer.site.value].format(layer.index)) if paths else None
        assert layer.module is own


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


def test_looking_does_not_change_the_model() -> None:
    for family, row in FAMILIES.items():
        model, other = base_model(family, row.tasks[0]), base_model(family, row.tasks[0])
        _ = Backbone(model).attention_layers
        assert not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, row in FAMILIES.items() for t in row.tasks])
def test_heads(family: str, task: str) -> None:
    heads = {"gpt2": ["score"], "llama": ["score"], "bert": ["classifier"], "bart": ["classification_head"]}
    assert Backbone(base_model(family, task)).head_names == (heads[family] if task == SEQ_CLS else [])


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


@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 64), ("bert", 64), ("bart", 64), ("llama", None), ("gemma3", None), ("bloom", None), ("t5", None)],
)
def test_positions(family: str, limit: int | None) -> None:
    backbone = Backbone(base_model(family, FAMILIES[family].tasks[0]))
    assert [stack.table_size for stack in backbone.stacks] == [limit] * len(backbone.stacks)
