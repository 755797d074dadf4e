"""What each layer's attention is given for its prefix, against loops over rows, queries and virtual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, base_model
from tests.injection.samples import prefix
from torch import Tensor

from softtune import UnsupportedModelError
from softtune.backbone import Backbone, Site
from softtune.compat import DynamicCache
from softtune.injection.arrangement import Arrangement
from softtune.injection.cache import PrefixCache
from softtune.injection.columns import Columns
from softtune.injection.prefixes import Prefixes, check_reached
from softtune.injection.rows import RowPrompts
from softtune.injection.step import Step
from softtune.methods.prompt import Prompt

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])


def arranged(
    backbone: Backbone, prompts: list[Prompt], mask: Tensor | None = MASK, *, site: int = 0, **call: Any
) -> tuple[Prefixes, Arrangement]:
    stack = backbone.stacks[site]
    layers = [a for a in backbone.attention_layers if any(a.place in p.prefixes for p in prompts)]
    layers = [a for a in layers if a.site in (stack.site, Site.CROSS)]
    rows = RowPrompts.from_prompts(prompts, layers, stack, reads=site == 0)
    ids = torch.ones(len(prompts), 5, dtype=torch.long) if mask is None else mask
    step = Step({"input_ids": ids, "attention_mask": mask, **call})
    return Prefixes(stack, layers), Arrangement(step, rows, Columns(None, None).in_call(step, rows, None))


def llama() -> Backbone:
    return Backbone.shared(base_model("llama", CAUSAL_LM))


def test_every_row_gets_its_own_prefix_and_sees_nothing_else() -> None:
    backbone = llama()
    prompts = [prefix(backbone.attention_layers, n) for n in (3, 1)] + [Prompt()]
    prefixes, arrangement = arranged(backbone, prompts)
    wrapper = prefixes.attention(arrangement)
    for layer in backbone.attention_layers:
        visible = wrapper.visible[layer.module]
        for row, length in enumerate((3, 1, 0)):
            assert visible[row].tolist() == [[place >= 3 - length for place in range(3)]]
            if length:
                own = prompts[row].prefixes[layer.place]
                assert torch.equal(wrapper.prefixes[layer.module].key[row, :, 3 - length :], own.key)
                assert torch.equal(wrapper.prefixes[layer.module].value[row, :, 3 - length :], own.value)


def test_nothing_is_hidden_where_all_rows_see_all() -> None:
    backbone = llama()
    prefixes, arrangement = arranged(backbone, [prefix(backbone.attention_layers, 2)] * 3)
    assert prefixes.attention(arrangement).visible == {}


def test_an_infix_is_seen_from_the_last_token_before_it() -> None:
    backbone = llama()
    prefixes, arrangement = arranged(backbone, [prefix(backbone.attention_layers, 2, after_text=True)] * 3)
    visible = prefixes.attention(arrangement).visible[backbone.attention_layers[0].module]
    for row, end in enumerate((5, 5, 3)):
        assert visible[row].tolist() == [[column >= end - 1] * 2 for column in range(5)]


def test_some_layers_alone_have_a_prefix() -> None:
    backbone = llama()
    prefixes, arrangement = arranged(backbone, [prefix(backbone.attention_layers[1:], 2)] * 3)
    assert set(prefixes.attention(arrangement).prefixes) == {a.module for a in backbone.attention_layers[1:]}


@torch.no_grad()
def test_t5_scores_a_prefix_right_before_the_text() -> None:
    backbone = Backbone.shared(base_model("t5", SEQ_2_SEQ_LM))
    encoder = [a for a in backbone.attention_layers if a.site is Site.ENCODER]
    prefixes, arrangement = arranged(backbone, [prefix(encoder, 2)] * 3)
    module = encoder[0].module
    bias = prefixes.attention(arrangement).biases[module]
    owner: Any = backbone.stacks[0].relative_bias
    for row, start in enumerate((2, 0, 1)):
        for column in range(5):
            for place in range(2):
                distance = place - 2 - max(column - start, 0)
                sizes = owner.relative_attention_num_buckets, owner.relative_attention_max_distance
                bucket = owner._relative_position_bucket(torch.tensor(distance), True, *sizes)
                expected = owner.relative_attention_bias.weight[bucket]
                torch.testing.assert_close(bias[row if len(bias) > 1 else 0, :, column, place], expected)


def test_a_layer_that_did_not_call_is_told() -> None:
    backbone = llama()
    prefixes, arrangement = arranged(backbone, [prefix(backbone.attention_layers, 2)] * 3)
    wrapper = prefixes.attention(arrangement)
    wrapper.reached |= {id(a.module) for a in backbone.attention_layers[:-1]}
    with pytest.raises(UnsupportedModelError, match="did not reach every layer"):
        check_reached(prefixes.stack, prefixes.layers, wrapper, {})
    wrapper.reached.add(id(backbone.attention_layers[-1].module))
    check_reached(prefixes.stack, prefixes.layers, wrapper, {})


def test_cross_attention_is_expected_where_there_is_an_encoder() -> None:
    backbone = Backbone.shared(base_model("bart", SEQ_2_SEQ_LM))
    cross = [a for a in backbone.attention_layers if a.site is Site.CROSS]
    prefixes, arrangement = arranged(backbone, [prefix(cross, 2)] * 3, site=1)
    wrapper = prefixes.attention(arrangement)
    assert {*wrapper.crossing} == {a.module for a in cross}
    check_reached(prefixes.stack, prefixes.layers, wrapper, {})
    with pytest.raises(UnsupportedModelError, match="did not reach"):
        check_reached(prefixes.stack, prefixes.layers, wrapper, {"encoder_hidden_states": torch.zeros(3, 2, 8)})


def test_layers_without_the_interface_get_a_cache() -> None:
    backbone = Backbone.shared(base_model("bloom", CAUSAL_LM))
    prompts = [prefix(backbone.attention_layers, 2)] * 3
    prefixes, arrangement = arranged(backbone, prompts)
    call: dict[str, Any] = {"attention_mask": MASK, "cache": DynamicCache()}
    prefixes.add_cache(call, arrangement)
    assert isinstance(call["cache"], PrefixCache)
    assert call["cache"].get_seq_length() == 2
    for row, mask in enumerate(call["attention_mask"].tolist()):
        start = MASK[row].tolist().index(1)
        own = MASK[row].tolist()
        assert mask == [*own[:start], 1, 1, *own[start:]]
    layer = backbone.attention_layers[0]
    key, value = torch.randn(3, layer.heads, 5, layer.key_size), torch.randn(3, layer.heads, 5, layer.value_size)
    joined, _ = call["cache"].update(key, value, 0)
    for row, start in enumerate((2, 0, 1)):
        own = prompts[row].prefixes[layer.place].key
        assert torch.equal(joined[row], torch.cat([key[row, :, :start], own, key[row, :, start:]], dim=1))


def test_rows_that_a_model_cannot_count_are_refused() -> None:
    backbone = Backbone.shared(base_model("bart", SEQ_2_SEQ_LM))
    decoder = [a for a in backbone.attention_layers if a.site is Site.DECODER]
    prefixes, arrangement = arranged(backbone, [prefix(decoder, n) for n in (2, 1, 2)], site=1)
    with pytest.raises(UnsupportedModelError, match="goes by the length of its cache"):
        prefixes.add_cache({"attention_mask": MASK}, arrangement)
