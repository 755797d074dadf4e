"""A model has softtune's attention while a session runs, and from its first call with an adapter on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.families import FAMILIES, adapted, base_model
from transformers import LlamaForCausalLM, PreTrainedModel

from softtune import PeftModel, UnsupportedModelError
from softtune.backbone import Backbone, model_session
from softtune.backbone.routing import install, routed
from softtune.compat import AttentionInterface, attention_name, configs_of, has_interface, set_attention_name
from softtune.methods import TaskType

IDS = torch.tensor([[5, 6, 7]])
LLAMA = ("llama", TaskType.CAUSAL_LM)


def names(model: PreTrainedModel) -> list[str | None]:
    """The names, and not what they equal."""
    return [None if (name := attention_name(config)) is None else "".join(name) for config in configs_of(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_looked_at_keeps_its_names(family: str) -> None:
    model = base_model(family, FAMILIES[family].tasks[0])
    before = names(model)
    _ = Backbone(model).attention_layers
    PeftModel(model)
    assert names(model) == before
    with model_session(model):
        inside = names(model)
    assert names(model) == before
    if has_interface(model):
        assert inside == [name and f"softtune_{name}" for name in before]


def test_each_part_keeps_its_own_attention() -> None:
    model = base_model("t5", TaskType.SEQ_2_SEQ_LM)
    set_attention_name(model.encoder.config, "eager")
    before = names(model)
    assert {"eager", "sdpa"} <= {*before}
    with model_session(model):
        assert names(model) == [f"softtune_{name}" for name in before]
    assert names(model) == before


@torch.no_grad()
def test_what_is_made_of_a_model_with_an_adapter_has_stock_names() -> None:
    model = adapted(*LLAMA, "prefix")
    expected, base = model(IDS).logits, model.get_base_model()
    assert names(base) == ["softtune_sdpa"]
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert names(other) == ["sdpa"]
        assert type(attention_name(other.config)) is str
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IDS).logits, expected)


def test_blocks_that_overlap_end_in_any_order() -> None:
    config = base_model(*LLAMA).config
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    first, second, third = routed(one), routed(other), routed(one.model)
    for block in (first, second, third):
        block.__enter__()
    first.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert names(other) == ["softtune_sdpa"]
    second.__exit__(None, None, None)
    assert names(one) == names(other) == ["sdpa"]


def test_a_route_that_a_call_has_installed_outlives_the_block() -> None:
    model = adapted(*LLAMA, "prefix")
    with routed(model.get_base_model()):
        model(IDS)
    assert names(model.get_base_model()) == ["softtune_sdpa"]


def test_a_block_that_an_installed_route_has_outlived_ends_no_other() -> None:
    model = base_model(*LLAMA)
    first, second = routed(model), routed(model)
    first.__enter__()
    install(model)
    model.set_attn_implementation("eager")
    second.__enter__()
    first.__exit__(None, None, None)
    assert names(model) == ["softtune_eager"]
    second.__exit__(None, None, None)
    assert names(model) == ["eager"]


def test_another_attention_may_be_set_at_any_time() -> None:
    model = base_model(*LLAMA)
    with routed(model):
        model.set_attn_implementation("eager")
        with routed(model):
            assert names(model) == ["softtune_eager"]
    assert names(model) == ["eager"]
    with routed(model):
        model.set_attn_implementation("sdpa")
    assert names(model) == ["sdpa"]


def test_attention_without_masks_is_refused_and_nothing_stays() -> None:
    model = base_model(*LLAMA)
    AttentionInterface.register("mine", lambda *args, **kwargs: (args[1], None))
    set_attention_name(model.config, "mine")
    with pytest.raises(UnsupportedModelError, match="the attention implementation mine has no mask function: load"):
        _ = Backbone(model).attention_layers
    assert names(model) == ["mine"]
    set_attention_name(model.config, "sdpa")
    assert Backbone(model).takes_wrapper
    assert names(model) == ["sdpa"]
